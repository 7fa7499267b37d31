"""The parts of the benchmark: rows and their settings, one run in one process, the table of all runs.

`plans` resolves a row's name to settings, `runs` carries out a run and writes its file, `table` and `figures` read the
files. `examples/benchmark.py` defines the rows and starts the processes.
"""
