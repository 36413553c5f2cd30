"""What client and server share: soft labels, identity, wire bytes, errors. Knows only NumPy and a hash."""
