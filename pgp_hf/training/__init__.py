"""The trainer of a stream, its arguments, and what it measures and writes."""
