"""One training run: the session, the loop over its updates, evaluation."""
