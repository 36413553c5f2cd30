"""From what a user writes as the place of a label set to a reader of it.

A target is ``http(s)://HOST[:PORT][/PREFIX]/NAME`` or a folder. Storage is imported only for a folder.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from logitcache.client.http import HttpLabelSet
from logitcache.client.stats import Tally
from logitcache.labels.errors import (
    DigestChanged,
    InvalidRequest,
    LabelSetNotFound,
    StoreNotFound,
    TeacherMismatch,
)
from logitcache.labels.identity import TeacherId, check_name
from logitcache.labels.ids import Ids
from logitcache.labels.label_set import Description, LabelSet, Limits

USUAL_STORE = "label-sets"
"""Folder that label sets are written to unless told otherwise."""

_FORGOTTEN_SCHEME = re.compile(r"[\w.-]+:\d+(/.*)?")


@dataclass(frozen=True)
class HttpTarget:
    """A label set on a server: ``base_url`` ends before ``/v1``, without a slash."""

    base_url: str
    name: str

    def __str__(self) -> str:
        return f"{self.base_url}/{self.name}"


def parse_target(target: str | Path) -> HttpTarget | Path:
    """Where a label set is: on a server, or in a folder, whose path is made absolute so that other processes find it
    too.

    Raises:
        InvalidRequest: a URL of another scheme, without a host or a name, or with a query, fragment or password.
        InvalidName: the last part of the URL cannot be a label set's name.
    """
    text = str(target)
    if isinstance(target, Path) or "://" not in text:
        folder = Path(text).expanduser().absolute()
        if isinstance(target, str) and _FORGOTTEN_SCHEME.fullmatch(text) and not folder.exists():
            raise InvalidRequest(f"{text!r} is no folder; for a server write 'http://{text}'")
        return folder
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{text!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(
            f"{text!r} is not an address that can be asked: write http://HOST:PORT/NAME or a folder's path"
        )
    if url.userinfo or url.query or url.fragment:
        raise InvalidRequest("a label set's URL has no password, query or fragment: write http://HOST:PORT/NAME")
    # The prefix stays as it is encoded: %2F is no slash.
    prefix, _, name = url.raw_path.decode("ascii").partition("?")[0].rstrip("/").rpartition("/")
    if not name:
        raise InvalidRequest(f"{text!r} names no label set: write {text.rstrip('/')}/NAME")
    base = str(url.copy_with(path=prefix.removesuffix("/v1/label-sets") or "/", query=None, fragment=None))
    return HttpTarget(base.rstrip("/"), check_name(unquote(name)))


def beside(target: HttpTarget | Path, name: str) -> HttpTarget | Path:
    """Where another label set of the same store is."""
    check_name(name)
    return HttpTarget(target.base_url, name) if isinstance(target, HttpTarget) else target.parent / name


def example_ids(label_set: LabelSet) -> Ids | None:
    """Ids of all examples of a label set in a folder; None where they are their ordinals."""
    from logitcache.storage import LocalLabelSet, RecordedLabelSet

    assert isinstance(label_set, LocalLabelSet | RecordedLabelSet)
    return label_set.example_ids()


def open_label_set(
    target: HttpTarget | Path, *, timeout_s: float, retries: int | None, tally: Tally, key: str | None = None
) -> LabelSet:
    """A reader of the label set there.

    Raises:
        LabelSetNotFound, StoreNotFound, StorageFault: the folder holds no label set that can be read.
    """
    if isinstance(target, HttpTarget):
        return HttpLabelSet(target.base_url, target.name, timeout_s=timeout_s, retries=retries, key=key, tally=tally)
    from logitcache import storage  # only a folder needs it

    try:
        # Limits protect a server from its clients; a process need not be protected from itself.
        return storage.open_label_set(target, limits=Limits(ids=sys.maxsize, response_bytes=sys.maxsize))
    except (LabelSetNotFound, StoreNotFound) as error:
        meant = target.parent / USUAL_STORE / target.name
        if not meant.is_dir():
            raise
        raise type(error)(f"{error.message}; did you mean {str(meant)!r}?", **error.details) from error


def check_expected(found: Description, *, digest: str | None, teacher: str | TeacherId | None) -> None:
    """Refuse a label set that is not the one expected; None expects nothing.

    Raises:
        DigestChanged: none of its generations has this digest.
        TeacherMismatch: another teacher made it. A text is compared with the teacher's name and with its weights.
    """
    if digest is not None and not has_generation(found, digest):
        raise DigestChanged(
            f"{found.name!r} is at {found.digest or 'no digest yet: it is being built'}, and none of its "
            f"{len(found.generations):,} generations is the pinned {digest}; pin a digest that it has to go on with it",
            expected=digest,
            served=found.digest,
        )
    actual = found.identity.teacher
    if teacher is None or teacher in (actual, actual.name, actual.weights):
        return
    raise TeacherMismatch(
        f"{found.name!r} was labelled by {actual}, not by {teacher}; connect to another label set, or precompute one",
        expected=_json_value(teacher),
        served=_json_value(actual),
    )


def has_generation(described: Description, digest: str) -> bool:
    """Some generation of the label set has this digest."""
    return any(generation.digest == digest for generation in described.generations)


def check_successor(before: Description, now: Description, target: str, served: str | None) -> None:
    """Refuse another label set in the place of one that was read before; one that grew or was repaired is the same.

    Args:
        before: the label set as it was described.
        now: what is described in its place.
        target: where that is, for the message.
        served: digest of what was just read there.

    Raises:
        DigestChanged: another label set stands there.
    """
    if changed := before.identity.differences(now.identity):
        raise DigestChanged(
            f"{target} was replaced by another label set ({', '.join(changed)} changed): these rows are not of the "
            "one that you connected to; connect again to take it",
            expected=before.digest,
            served=served,
        )
    if served is not None and not has_generation(now, served):
        raise DigestChanged(
            f"{target} sends rows of {served} and describes a label set without such a generation: do several servers "
            "with different stores answer at this address?",
            expected=now.digest,
            served=served,
        )
    # What was sealed once stays among the generations; only another label set lacks it.
    if before.generations and before.generations[-1] not in now.generations:
        raise DigestChanged(
            f"{target} was made anew: it was at {before.digest} (generation {before.generation}) and is at "
            f"{now.digest} (generation {now.generation}), so its examples may be others; connect again to take it",
            expected=before.digest,
            served=served,
        )


def _json_value(teacher: str | TeacherId) -> Any:
    return teacher if isinstance(teacher, str) else vars(teacher)
