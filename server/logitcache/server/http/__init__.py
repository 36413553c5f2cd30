"""The HTTP service: the app over the label sets of one store, and the process that serves it."""
