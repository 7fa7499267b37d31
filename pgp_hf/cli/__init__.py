"""The command line of the examples: its arguments, and the comparison that each of them runs."""
