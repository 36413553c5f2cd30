"""The command line: arguments in, one function called, text out.

Exit codes: 0 done, 1 an error of ours or damage found, 2 wrong usage, 130 interrupted. A subcommand imports what it
needs when it runs, so that ``ls``, ``info``, ``fetch`` and ``verify`` work in the light install, and the others say
which extra they lack.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from logitcache.labels.errors import LogitcacheError, ShardDamaged
from logitcache.labels.identity import check_name
from logitcache.server.http.rows_json import fetch_rows, is_whole_number, parse_id, parse_rows, rows_to_json
from logitcache.server.jobs.recording import recorded
from logitcache.server.listing import keys_table, page, table
from logitcache.server.names import not_found
from logitcache.server.terminal import Commands, extra, sigterm_as_interrupt, store_option
from logitcache.server.wording import size
from logitcache.storage import Readable, Recording, label_set_names
from logitcache.storage import open_label_set as opened


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="logitcache")
@click.option("--debug", is_flag=True, envvar="LOGITCACHE_DEBUG", help="Show tracebacks.  [env: LOGITCACHE_DEBUG=1]")
def cli(debug: bool) -> None:
    """Precompute a teacher's top-k logits once, and serve them to every training loop.

    \b
    Example:
      logitcache precompute digits --teacher my.models:teacher --dataset my.data:train --top-k 10
      logitcache serve
    """


@contextmanager
def open_label_set(store: Path, name: str, verify: Literal["strict", "background"] = "strict") -> Iterator[Readable]:
    """One label set of a store, closed afterwards; an unknown name is answered with those that are near."""
    check_name(name)
    names = label_set_names(store)
    if name not in names:
        raise not_found(name, names)
    with closing(opened(store / name, verify=verify)) as label_set:
        yield label_set


@cli.command()
@click.argument("name")
@click.option(
    "--teacher",
    "teachers",
    required=True,
    multiple=True,
    metavar="SPEC",
    help="module:callable that returns the teacher; given several times, the mean of their distributions is stored.",
)
@click.option("--dataset", required=True, metavar="SPEC", help="module:callable that returns the dataset.")
@store_option
@click.option("--top-k", required=True, type=click.IntRange(min=1), help="Classes to store of each row.")
@click.option(
    "--temperature", "temperatures", multiple=True, type=float, help="Declare one besides 1; may be repeated."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples a forward pass.  [default: 256; 16 of tokens]")
@click.option("--device", help="Where the teacher runs, as torch names it.  [default: a GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the stored logits, not of the teacher.",
)
@click.option(
    "--rows-per-shard",
    type=click.IntRange(min=1),
    help="Rows committed together, a multiple of 4096; unless given, about a sixteenth of all: 32,768 to 262,144.",
)
@click.option(
    "--loader-workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that read the dataset.",
)
@click.option(
    "--targets/--no-targets",
    default=None,
    help="Store the dataset's targets, and the teacher's logits of them.  [default: where it gives whole numbers]",
)
@click.option(
    "--views",
    type=click.IntRange(min=1),
    help="Make each item so many times, under seeds that the student replays, and store a row of each.",
)
@click.option("--seed", type=click.IntRange(min=1), help="Of the views.  [default: 1]")
@click.option("--plan", "only_plan", is_flag=True, help="Say how large it gets and how long it takes, and stop.")
def precompute(only_plan: bool, teachers: tuple[str, ...], temperatures: tuple[float, ...], **arguments: Any) -> None:
    """Label a dataset with a teacher, as NAME.

    The same line again resumes what was interrupted, and appends what the dataset has more by now. The working folder
    is importable in a SPEC.

    \b
    Example:
      logitcache precompute digits --teacher my.models:teacher --dataset my.data:train --top-k 10 --temperature 2
    """
    with recorded() as job:
        with extra("teacher", "precompute"):
            from logitcache.server.labelling.plan import plan
            from logitcache.server.labelling.precompute import precompute as run
            from logitcache.server.labelling.preparation import Request
            from logitcache.server.progress import reporter
        request = Request(teacher=teachers, temperatures=temperatures, **arguments)
        try:
            with sigterm_as_interrupt():
                with reporter(file=job.progress) as watcher:
                    if only_plan:
                        told = str(plan(request, watcher))
                    else:
                        summary = run(request, watcher)
                        told = str(summary)
                        job.succeeded(summary.digest)
                click.echo(told)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; what is committed is kept, and the same line again goes on from there"
            ) from None


@cli.command()
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--verify",
    type=click.Choice(["strict", "background"]),
    default="strict",
    show_default=True,
    help="strict: no row before its shard is hashed once.",
)
@click.option(
    "--scrub-hours",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hash everything again after so many hours; 0 never does.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning"]),
    default="info",
    show_default=True,
    help="info tells what is refused and what changes; debug each batch and probe, too.",
)
@click.option(
    "--auth",
    type=click.Choice(["keys", "none"]),
    help="keys: nobody without one; none: anybody who connects.  [default: keys where the store has any]",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A host name that the server goes by, if it has a dot and is not this machine's own; may be repeated.",
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes that serve together."
)
@click.option("--record", is_flag=True, help="Let training runs record label sets into the store.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML: these options, which win over it, and the teachers and datasets that jobs may name.",
)
@click.pass_context
def serve(ctx: click.Context, /, store: Path, config_file: Path | None, **options: Any) -> None:
    """Serve the store's label sets over HTTP.

    Until SIGTERM or Ctrl-C; requests under way are finished first. New label sets are served without a restart.

    \b
    Example:
      logitcache serve --port 8000
      curl localhost:8000/v1/label-sets/digits/fetch -H 'Content-Type: application/json' -d '{"ids": [3, 1, 4]}'
    """
    with extra("server", "serve"):
        from logitcache.server.config import Config
        from logitcache.server.http import serve as server
    if config_file is not None:
        config = Config.read(config_file)
        given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
        options |= {name: value for name, value in config.server if name not in given} | {"config": config}
        store = store if "store" in given else config.store_folder or store
    server.serve(store, **options)


@cli.group()
def keys() -> None:
    """Make and revoke the keys that a server asks for.

    \b
    Example:
      logitcache keys make trainer --scope write
      logitcache serve --host 0.0.0.0
    """


def _keys(store: Path) -> Any:
    """The keys of a store that is there."""
    with extra("server", "keys"):
        from logitcache.server.keys import Keys
    label_set_names(store)
    return Keys(store)


@keys.command("make")
@click.argument("name")
@store_option
@click.option(
    "--scope",
    type=click.Choice(["read", "write", "admin"]),
    default="read",
    show_default=True,
    help="read: soft labels; write: also record and ask for jobs; admin: also cancel jobs.",
)
def make_key(name: str, store: Path, scope: Any) -> None:
    """Make a key NAME of the store and print it: it is told here and never again.

    \b
    Example:
      export LOGITCACHE_KEY=$(logitcache keys make trainer)
    """
    click.echo(_keys(store).make(name, scope))


@keys.command("ls")
@store_option
def list_keys(store: Path) -> None:
    """List the keys of the store, without what they are.

    \b
    Example:
      logitcache keys ls
    """
    click.echo(keys_table((key.name, key.scope, key.made) for key in _keys(store).read()))


@keys.command("revoke")
@click.argument("name")
@store_option
def revoke_key(name: str, store: Path) -> None:
    """Revoke the key NAME: servers refuse it within a second.

    \b
    Example:
      logitcache keys revoke trainer
    """
    _keys(store).revoke(name)
    click.echo(f"{name} is revoked")


@cli.command("ls")
@store_option
def list_label_sets(store: Path) -> None:
    """List the label sets of the store.

    \b
    Example:
      logitcache ls
    """
    descriptions, failed = [], False
    for name in label_set_names(store):
        try:
            with open_label_set(store, name, verify="background") as label_set:
                descriptions.append(label_set.describe())
        except LogitcacheError as error:
            click.echo(f"error: {error.message}", err=True)
            failed = True
    click.echo(table(descriptions))
    if failed:
        sys.exit(1)


@cli.command()
@click.argument("name")
@store_option
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, as the server describes it.")
def info(name: str, store: Path, as_json: bool) -> None:
    """Tell what NAME is and how far it is.

    \b
    Example:
      logitcache info digits
    """
    with open_label_set(store, name, verify="background") as label_set:
        description = label_set.describe()
    click.echo(json.dumps(description.to_json(), indent=2) if as_json else page(description))


class _TakingIds(click.Command):
    """A command whose arguments may begin with a dash: whole numbers anywhere, and anything after ``--``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["after_dashes"] = len(args) - args.index("--") - 1 if "--" in args else 0
        return super().parse_args(ctx, args)


# A negative id looks like an option to click, so options that it does not know come as ids.
@cli.command(cls=_TakingIds, context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@store_option
@click.option("--rows", metavar="START:STOP", help="Which rows of each example, where it has a row a token.")
@click.option("--view", default=0, show_default=True, help="Which augmentation.")
@click.option("--digest", help="The generation to read; fail unless the label set has it.")
@click.option(
    "--on-missing",
    type=click.Choice(["error", "mask"]),
    default="error",
    show_default=True,
    help="What to do about ids without labels.",
)
@click.pass_context
def fetch(
    ctx: click.Context, /, name: str, ids: tuple[str, ...], store: Path, rows: str | None, **options: Any
) -> None:
    """Print soft labels of examples as JSON.

    It is what the server answers to the same ids. Where ids are texts, write -- before one that begins with a dash.

    \b
    Example:
      logitcache fetch digits 3 1 4
      logitcache fetch books --rows 0:512 -- moby-dick/7 -draft-
    """
    known = [option for parameter in ctx.command.params for option in parameter.opts]
    for option in ids[: max(0, len(ids) - ctx.meta["after_dashes"])]:
        if option.startswith("-") and option != "-" and not is_whole_number(option):
            message = f"No such option: {option}; an id that begins with a dash goes after --."
            raise click.NoSuchOption(option, message, known, ctx)
    with open_label_set(store, name) as label_set:
        wanted = [parse_id(id, label_set.identity.ids) for id in ids]
        click.echo(json.dumps(rows_to_json(fetch_rows(label_set, wanted, rows=parse_rows(rows), **options))))


def _shown_by(bar: Any) -> Callable[[int, int], None]:
    """A progress bar as a function of what is done and of what there is."""

    def progress(done: int, total: int) -> None:
        bar.length = total
        bar.update(done - bar.pos)

    return progress


@cli.command()
@click.argument("name")
@store_option
@click.option(
    "--threads", type=click.IntRange(1), help="Shards hashed at once; one for each processor, up to 8, unless told."
)
def verify(name: str, store: Path, threads: int | None) -> None:
    """Hash every shard of NAME anew.

    Damaged shards are named and no longer served, and the exit code is 1.

    \b
    Example:
      logitcache verify digits
    """
    with open_label_set(store, name) as label_set:
        began = time.perf_counter()
        with click.progressbar(length=0, label="verifying", file=sys.stderr) as bar:
            reports = label_set.verify_all(_shown_by(bar), threads)
        took, hashed = time.perf_counter() - began, bar.pos
        description = label_set.describe()
    damaged = [report for report in reports if not report.ok]
    for report in damaged:
        prefix = f"shard {report.shard}: "
        click.echo(prefix + (report.problem or "").removeprefix(prefix))
    if damaged:
        raise ShardDamaged(
            f"{len(damaged):,} of {description.shards.total:,} shards of {name!r} are damaged; "
            "run its precompute again: it labels these shards anew and nothing else"
        )
    click.echo(
        f"{len(reports):,} of {description.shards.total:,} shards are committed, and are what their commits say; "
        f"{description.examples - description.labelled:,} examples are not labelled\n"
        f"{size(hashed)} hashed in {took:.1f} s, {size(hashed / max(took, 1e-9))} a second"
    )


@cli.command()
@click.argument("name")
@store_option
@click.option("--part", is_flag=True, help="Seal the examples that were recorded, though others were not.")
def seal(name: str, store: Path, part: bool) -> None:
    """Seal NAME, which a run recorded and did not finish.

    Killed on the way, the same line again goes on. Examples that were not recorded are told; with --part they are left
    out, and ids that were the examples' ordinals become whole numbers of their own.

    \b
    Example:
      logitcache seal run-7 --part
    """
    check_name(name)
    if name not in (names := label_set_names(store)):
        raise not_found(name, names)
    with (
        sigterm_as_interrupt(),
        Recording(store / name) as recording,
        click.progressbar(length=0, label="sealing", file=sys.stderr) as bar,
    ):
        generation = recording.seal(part=part, progress=_shown_by(bar))
    click.echo(f"{name}: {generation.examples:,} examples\ndigest      {generation.digest}")


@cli.command()
@click.argument("part", required=False, type=click.Choice(["digits", "language"]))
@click.option(
    "--out",
    default="./demo-output",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the label sets, the tables and the plots.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Students a method.")
@click.option("--quick", is_flag=True, help="A smaller run, to see that it works.")
def demo(part: str | None, out: Path, seeds: int, quick: bool) -> None:
    """Distil with cached labels, and compare: of digits and of a language, or of PART alone.

    The same student, from the same seeds: on hard labels only, with the live teacher, and from cached labels over HTTP.

    \b
    Example:
      logitcache demo digits --seeds 1 --quick
    """
    with extra("demo", "demo"):
        from logitcache.server.demo import main as demonstration
    with sigterm_as_interrupt():
        demonstration.run(out, seeds, quick, part)


def main() -> None:
    """Entry point of the ``logitcache`` command."""
    cli(prog_name="logitcache")
