"""Trackers: TensorBoard, Weights & Biases, MLflow and Trackio, each in a process of its own.

`sink.py` is the output of the run that tells them; `figures.py` decides names and values; each
tracker's file writes them with its package. See docs/trackers.md.
"""
