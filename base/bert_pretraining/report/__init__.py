"""`report`: pictures, a page and a summary of runs' logs."""
