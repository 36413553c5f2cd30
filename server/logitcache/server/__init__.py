"""Precompute, the HTTP service and the command line. Knows storage; knows the client only in its demo."""
