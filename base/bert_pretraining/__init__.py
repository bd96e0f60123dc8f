"""BERT pretraining, MLPerf style: packed tokens, LAMB, honest logs."""

__version__ = "0.1.0"
