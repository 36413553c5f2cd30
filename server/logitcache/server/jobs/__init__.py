"""Jobs: precomputes that the server runs, each the command line in a process of its own and a folder of state files."""
