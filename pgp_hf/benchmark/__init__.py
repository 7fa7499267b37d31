"""The benchmark's parts: what a row is, one run in one process, and the table of all runs.

`plans` resolves a row's name to settings, `runs` carries one out and writes its file, `table` and `figures` read the
files. `examples/benchmark.py` has the rows and starts the processes.
"""
