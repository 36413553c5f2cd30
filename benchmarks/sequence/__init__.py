"""What cached labels save in a sequence of runs: the experiments behind `sequence_of_runs.py`."""
