"""Measurements: `python -m bert_pretraining bench ...`, and what benchmarks/ shares with it."""
