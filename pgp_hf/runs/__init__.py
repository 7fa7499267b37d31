"""What is on disk: the files of a run, written whole and read with suspicion."""
