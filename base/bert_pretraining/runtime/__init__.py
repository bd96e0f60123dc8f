"""What a process needs around training: process group, files, signals, seeds, rank reports."""
