"""The command line of the examples: arguments, and the paired run that they share."""
