"""Where a recorder's rows go: the log of a folder in this process, or a server's."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from logitcache.client.deadline import Deadline
from logitcache.client.http import HttpLabelSet
from logitcache.client.part_errors import with_texts
from logitcache.client.response import JSON, parse_json
from logitcache.client.target import HttpTarget
from logitcache.labels import wire
from logitcache.labels.errors import LogitcacheError, MalformedMessage
from logitcache.labels.ids import Ids
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who

if TYPE_CHECKING:
    from logitcache.storage import Recording

MOST_ANSWER_BYTES = 8 << 20


@runtime_checkable
class Sink(Protocol):
    """What takes rows and makes them durable. Used by one thread at a time."""

    def begin(self, terms: RecordingTerms, who: Who, ids: Ids | None) -> Stand:
        """Begin to record, or go on."""

    def append(self, rows: RecordedRows, who: Who) -> None:
        """Make rows durable: all when this returns, or none."""

    def finish(self, who: Who, *, part: bool) -> Stand:
        """This recorder has recorded all that it has. While the answer is ``sealing``, ask again."""

    def close(self) -> None:
        """Let go of files and connections."""


class LocalSink:
    """A folder of this machine, which one process records into."""

    def __init__(self, path: Path) -> None:
        from logitcache import storage  # only a folder needs it

        self._storage, self._path = storage, path
        self._recording: Recording | None = None

    def begin(self, terms: RecordingTerms, who: Who, ids: Ids | None) -> Stand:
        """See `Sink.begin`."""
        if self._recording is None:
            self._recording = self._storage.Recording(self._path, terms, ids)
        self._recording.begin(who)
        return self._recording.stand()

    def append(self, rows: RecordedRows, who: Who) -> None:
        """See `Sink.append`."""
        self._begun.append(rows, who)

    def finish(self, who: Who, *, part: bool) -> Stand:
        """See `Sink.finish`; it is sealed when this returns, if all is there."""
        recording = self._begun
        recording.finish(who)
        stand = recording.stand()
        if len(stand.finished) < recording.terms.recorders or not (part or stand.recorded == stand.examples):
            return stand
        generation = recording.seal(part=part)
        return Stand(generation.examples, generation.examples, stand.rows, digest=generation.digest)

    def close(self) -> None:
        """See `Sink.close`."""
        if self._recording is not None:
            self._recording.close()

    @property
    def _begun(self) -> "Recording":
        if self._recording is None:
            raise RuntimeError("begin first")
        return self._recording


class HttpSink:
    """A server that records. ``like`` is another of its label sets, whose examples these are, if any."""

    def __init__(
        self, target: HttpTarget, like: str | None, *, timeout_s: float, retries: int | None, key: str | None = None
    ) -> None:
        self._there = HttpLabelSet(target.base_url, target.name, timeout_s=timeout_s, retries=retries, key=key)
        self._like, self._timeout_s = like, timeout_s

    def begin(self, terms: RecordingTerms, who: Who, ids: Ids | None) -> Stand:
        """See `Sink.begin`."""
        told = None if ids is None else ids.at(slice(None))
        asked = asdict(who) | {"terms": terms.to_json(), "ids": told, "like": self._like}
        return self._ask("PUT", "/recording", asked)

    def append(self, rows: RecordedRows, who: Who) -> None:
        """See `Sink.append`. Sent again after an answer was lost, the same rows are the same rows."""
        deadline = Deadline(self._timeout_s)
        body = rows.encode(who)
        try:
            answer = self._there.exchange("POST", "/record", body, JSON, MOST_ANSWER_BYTES, deadline, wire.MEDIA_TYPE)
        except LogitcacheError as error:
            raise with_texts(error, rows.ids) from error.__cause__
        told = parse_json(answer)
        if not isinstance(told, dict) or told.get("rows") != len(rows.soft):
            raise MalformedMessage(
                f"{self._there.url}/record did not say that it took {len(rows.soft):,} rows: is it a logitcache server?"
            )

    def finish(self, who: Who, *, part: bool) -> Stand:
        """See `Sink.finish`."""
        return self._ask("POST", "/recording/finish", asdict(who) | {"part": part})

    def close(self) -> None:
        """See `Sink.close`."""
        self._there.close()

    def _ask(self, method: str, part: str, asked: dict[str, Any]) -> Stand:
        body, deadline = json.dumps(asked).encode(), Deadline(self._timeout_s)
        return Stand.from_json(
            parse_json(self._there.exchange(method, part, body, JSON, MOST_ANSWER_BYTES, deadline, JSON))
        )
