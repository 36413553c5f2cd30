"""`record`: from the place of a label set that is to be, and what a run gives, to its recorder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from logitcache.client.recorder import BUFFER_BYTES, Recorder
from logitcache.client.recording_sinks import HttpSink, LocalSink, Sink
from logitcache.client.target import HttpTarget, parse_target
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.identity import Alignment, Dtype, Identity, declared
from logitcache.labels.ids import IdKind, Ids, as_ids
from logitcache.labels.recorded import Mode, RecordingTerms, recorder_id


def record(
    target: str | Path,
    *,
    run: str,
    steps: range,
    classes: int,
    top_k: int,
    examples: int | None = None,
    ids: Any = None,
    mode: Mode = "train",
    weights: str = "moving",
    preprocessing: str = "",
    temperatures: Iterable[float] = (),
    dtype: Dtype = "float16",
    targets: bool = False,
    alignment: Alignment = "pointwise",
    views: int = 1,
    seed: int = 0,
    rank: int = 0,
    recorders: int = 1,
    buffer_bytes: int = BUFFER_BYTES,
    timeout_s: float = 60.0,
    retries: int | None = None,
    key: str | None = None,
) -> Recorder:
    """Begin to record a new label set, or go on with one that was begun with the same arguments.

    Where there is a label set of the same examples, `Labels.record` takes them and most of the rest from it.

    Args:
        target: ``"http://HOST:PORT/NAME"`` of a server that was started with ``--record``, or the folder that is to
            hold the label set, which one process records into.
        run: name of the run that records.
        steps: of the optimizer, at which it does: ``range(first, last + 1)``.
        classes: of its model.
        top_k: how many of them are stored of each row.
        examples: how many there are, where their ids are 0 to ``examples - 1``.
        ids: of the examples in the order that the label set shall have, where they are others.
        mode: how the model runs: ``"train"`` or ``"eval"``.
        weights: ``"moving"`` while they are trained; else the digest or name of a checkpoint.
        preprocessing: what was done to inputs before the model saw them, as you would tell another team.
        temperatures: to declare besides 1.
        dtype: of the stored logits.
        targets: store targets, and the model's logits of them.
        alignment: ``"causal"`` for a row a token.
        views: how many views an example has, each of which is recorded.
        seed: of the views; 0 where inputs are as the dataset gives them.
        rank: which of the recorders this is.
        recorders: how many record together, such as the processes of a distributed run.
        buffer_bytes: of rows that may wait to be sent before `Recorder.add` waits, too.
        timeout_s: total seconds that a request may take, retries included.
        retries: attempts after the first; None means as many as fit into ``timeout_s``.
        key: of the server, of scope write, if it wants one; else that of the environment's ``LOGITCACHE_KEY``.

    Raises:
        KeyRefused, ScopeTooSmall: the server wants a key, or one that may do more.
        IdentityChanged: there is such a label set already, or it was begun with something else; each is named.
        RequestRefused: the server does not record.
        InvalidRequest, InvalidName, InvalidIds: an argument cannot be right.
        LabelSetLocked: another process records into the folder.
        DeadlineExceeded, Unavailable: no answer within the time allowed.
    """
    if (examples is None) == (ids is None):
        raise InvalidRequest("say what the examples are: examples=N where their ids are 0 to N - 1, else ids=[…]")
    known = None if ids is None else as_ids(ids)
    kind: IdKind = "ordinal" if known is None else "text" if known.are_texts else "integer"
    identity = checked(
        Identity(
            teacher=recorder_id(run, steps, mode, weights, preprocessing),
            k=top_k,
            classes=classes,
            temperatures=declared(temperatures),
            dtype=dtype,
            alignment=alignment,
            targets=targets,
            ids=kind,
            views=views,
            seed=seed,
        )
    )
    terms = RecordingTerms(identity, steps, len(known) if known is not None else examples or 0, recorders)
    sink = sink_of(parse_target(target), None, timeout_s=timeout_s, retries=retries, key=key)
    return begun(sink, str(target), terms, rank, known, buffer_bytes)


def checked(identity: Identity) -> Identity:
    """The identity, if a label set can have it.

    Raises:
        InvalidRequest: a field is out of its bounds.
    """
    try:
        return Identity.from_json(identity.to_json())
    except ValueError as error:
        raise InvalidRequest(f"no label set can be like that: {error}") from None


def sink_of(
    target: HttpTarget | Path, like: str | None, *, timeout_s: float, retries: int | None, key: str | None
) -> Sink:
    """Where rows go that are recorded at a target; ``like`` is a label set of the same server with these examples."""
    if isinstance(target, HttpTarget):
        return HttpSink(target, like, timeout_s=timeout_s, retries=retries, key=key)
    return LocalSink(target)


def begun(sink: Sink, target: str, terms: RecordingTerms, rank: int, ids: Ids | None, buffer_bytes: int) -> Recorder:
    """A recorder into a sink, which is closed if it cannot begin."""
    try:
        RecordingTerms.from_json(terms.to_json())
    except ValueError as error:
        raise InvalidRequest(f"nothing can be recorded like that: {error}") from None
    name = target.rstrip("/").rpartition("/")[2]
    try:
        return Recorder(name, sink, terms, rank=rank, ids=ids, buffer_bytes=buffer_bytes)
    except BaseException:
        sink.close()
        raise
