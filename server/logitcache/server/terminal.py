"""How subcommands meet the terminal: errors as one line, Ctrl-C as an exit code, missing packages as a hint.

Knows click and the error tree, and no subcommand.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from logitcache.labels.errors import LogitcacheError, MissingExtra

Command = Callable[..., Any]


class Commands(click.Group):
    """Runs a subcommand and turns what it raises into a line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; with ``--debug`` an error keeps its traceback."""
        try:
            return super().invoke(ctx)
        except LogitcacheError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error.message}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "interrupted", err=True)
            ctx.exit(130)


def store_option(command: Command) -> Command:
    """Give a subcommand the option ``--store``."""
    return click.option(
        "--store",
        envvar="LOGITCACHE_STORE",
        default="./label-sets",
        type=click.Path(path_type=Path),
        show_default=True,
        show_envvar=True,
        help="Folder that holds the label sets.",
    )(command)


@contextmanager
def extra(name: str, subcommand: str) -> Iterator[None]:
    """Say which extra is missing when an import inside fails.

    Raises:
        MissingExtra: a package that this extra brings is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("logitcache"):
            raise
        raise MissingExtra(
            f"`logitcache {subcommand}` needs {error.name.partition('.')[0]}, which is not installed; "
            f"run: pip install 'logitcache[{name}]'",
            extra=name,
        ) from None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: what is committed is kept, and whoever waits gets its exit code."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
