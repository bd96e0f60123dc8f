"""What every process needs: process group, rank reports, signals, seeds, files, a lock."""
