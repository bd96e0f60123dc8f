"""Makes, verifies and downloads data sets."""
