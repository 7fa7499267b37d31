"""Provide the examples' command line: its arguments, and the comparison that each of them runs."""
