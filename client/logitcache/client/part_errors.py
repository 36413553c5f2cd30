"""Errors of the parts of one call, told as a reader in this process would tell them of the whole; and what they do not
know of the caller.

Texts travel as their keys, so a server names them by 32 hexadecimal digits; whoever called has the texts. It knows
errors and ids, and nothing of HTTP.
"""

import re
from typing import Any, TypeVar

from logitcache.labels.errors import LogitcacheError, RangeOutside, RowsMissing
from logitcache.labels.ids import Ids
from logitcache.labels.label_set import Description
from logitcache.labels.missing import AGAIN, NOT_YET, rows_missing

Error = TypeVar("Error", bound=LogitcacheError)

_NAMING = ("unknown", "unlabelled", "ids")
"""Details of errors that name examples."""

_KEY = re.compile(r"'([0-9a-f]{32})'")


def with_texts(error: LogitcacheError, ids: Ids) -> LogitcacheError:
    """The error with the texts that were asked for in place of their keys, in its details and in its message."""
    if not ids.are_texts or ids.texts is None:
        return error
    texts = dict(zip(Ids(ids.keys).at(slice(None)), ids.at(slice(None)), strict=True))

    def named(value: Any) -> Any:
        return texts.get(value, value) if isinstance(value, str) else value

    details = {
        name: [named(entry) for entry in value] if name in _NAMING and isinstance(value, list) else value
        for name, value in error.details.items()
    }
    return _told(type(error), _KEY.sub(lambda found: repr(named(found[1])), error.message), details, error)


def _told(kind: type[Error], message: str, details: dict[str, Any], of: LogitcacheError) -> Error:
    """An error in other words. Details are set, not passed: those of a problem may have any name."""
    error = kind(message)
    error.details, error.request_id, error.retry_after_s = details, of.request_id, of.retry_after_s
    return error


def all_missing(parts: list[RowsMissing], ids: Ids, described: Description, digest: str | None) -> RowsMissing:
    """One error for the ids without labels of all parts of a fetch; the parts' own are `with_texts` already.

    Args:
        parts: errors of the parts, in order.
        ids: all that was asked for.
        described: the label set, as it is now.
        digest: the generation that was asked for, or None.
    """
    damaged = described.shards.damaged
    sealed = {generation.digest: generation.examples for generation in described.generations}
    error = rows_missing(
        described.name,
        described.identity.ids,
        sealed.get(digest or described.digest or "", described.examples),
        asked=len(ids.at(slice(None))),
        unknown=list(dict.fromkeys(missing for part in parts for missing in part.unknown)),
        unlabelled=list(dict.fromkeys(missing for part in parts for missing in part.unlabelled)),
        reason=f"shards withdrawn as damaged: {damaged:,}; {AGAIN}" if damaged else NOT_YET,
    )
    error.request_id = parts[0].request_id
    return error


def all_outside(parts: list[RangeOutside]) -> RangeOutside:
    """One error for the ranges outside their examples of all parts of a fetch: the first one's, with the ids of all."""
    first = parts[0]
    ids = list(dict.fromkeys(outside for part in parts for outside in part.ids))
    more = len(ids) - len(first.ids)
    message = f"{first.message}; and {more:,} more in other parts of this fetch" if more else first.message
    return _told(RangeOutside, message, first.details | {"ids": ids}, first)


def of_pinned(error: RowsMissing, described: Description, digest: str) -> RowsMissing:
    """The error for ids that a pinned generation does not contain, with the pin: a newer one may contain them."""
    examples = next(
        (f" of {sealed.examples:,} examples" for sealed in described.generations if sealed.digest == digest), ""
    )
    pin = f"you are pinned to {digest}{examples}: pin a newer digest, or none, for examples that were added later"
    return _told(RowsMissing, f"{error.message}; {pin}", error.details, error)
