"""Reads the logs of runs, of this package and of others."""
