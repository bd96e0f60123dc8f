"""From runs to an MLPerf submission: run, assemble, check, rcp, summarize."""
