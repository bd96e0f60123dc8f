"""MLPerf log, PerfLog and the terminal."""
