"""BERT over packed tokens, with its MLM and NSP heads."""
