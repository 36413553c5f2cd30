"""``python -m logitcache.server`` is the ``logitcache`` command."""

from logitcache.server.cli import main

main()
