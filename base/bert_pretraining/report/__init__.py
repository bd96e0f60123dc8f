"""`report`: pictures, an HTML page and a text summary of runs' logs."""
