"""A body in JSON whose one long member is a list of ids, read a piece at a time.

Read in one call, a million ids would keep every other thread waiting, and as many bytes of other JSON for seconds.
What the ids stand for is not known here.
"""

import json
import re

import numpy as np

from logitcache.labels.errors import InvalidIds, RequestRefused, TooManyRows
from logitcache.labels.ids import Ids, as_ids

MOST_OTHER_BYTES = 64 << 10
"""Of a body without its ids."""

IDS_AT_ONCE = 8192
"""Ids that are made into keys together."""

_SPACE = rb"[ \t\n\r]{0,100}+"
_TOKEN = re.compile(rb'("ids"%s:%s\[)|("(?:[^"\\]|\\.){0,65536}+")|[\[{]|[\]}]|[^"\[\]{}]{1,65536}+' % (_SPACE, _SPACE))
_ID = rb'%s(?:"(?:[^"\\]{1,16}+|\\.){0,8192}+"|-?[0-9]{1,20}+)%s' % (_SPACE, _SPACE)
_SOME_IDS = re.compile(rb"%s(?:,%s){0,63}+" % (_ID, _ID), re.DOTALL)


def without_ids(body: bytes) -> tuple[bytes, Ids | None]:
    """A body with null in the place of the list of its member ``ids``, and that list; None where it has none.

    What is left may be no JSON; that is for whoever parses it to find.

    Raises:
        TooManyRows: what is left is longer than `MOST_OTHER_BYTES`.
        InvalidIds: the list holds something else than whole numbers or texts, or is empty; or there are two.
        RequestRefused: the list is no JSON.
    """
    rest, ids, at, depth = bytearray(), None, 0, 0
    while at < len(body) and (token := _TOKEN.match(body, at)) is not None:
        at, text = token.end(), token[0]
        if token[1] and depth == 1:
            if ids is not None:
                raise InvalidIds("ids: there are two lists of them")
            ids, at = _read_ids(body, at)
            text = b'"ids":null'
        elif not token[2]:
            depth += (text[-1:] in b"[{") - (text[-1:] in b"]}")
        rest += text
        if len(rest) > MOST_OTHER_BYTES:
            raise TooManyRows(
                f"all but the ids of such a request is less than {MOST_OTHER_BYTES >> 10} KiB",
                limit_bytes=MOST_OTHER_BYTES,
            )
    return bytes(rest + body[at : at + 1]), ids


def _read_ids(body: bytes, at: int) -> tuple[Ids, int]:
    """The ids of a list that begins there, behind its bracket, and where it has ended."""
    some: list[int | str] = []
    read: list[Ids] = []
    while (found := _SOME_IDS.match(body, at)) is not None:
        try:
            some += json.loads(b"[%s]" % found[0])
        except ValueError as error:
            raise RequestRefused(f"the body is not JSON: ids: {error}") from None
        at = found.end()
        if (after := body[at : at + 1]) == b"]" or len(some) >= IDS_AT_ONCE:
            read.append(as_ids(some))
            some = []
        if after == b"]":
            return _joined(read), at + 1
        if after != b",":
            break
        at += 1
    told = body[at : at + 40].decode(errors="replace")
    raise InvalidIds(f"ids: a list of whole numbers or of texts is wanted, not empty; it goes on with {told!r}")


def _joined(parts: list[Ids]) -> Ids:
    if len({part.are_texts for part in parts}) > 1:
        raise InvalidIds("ids are all numbers or all texts")
    keys = np.concatenate([part.keys for part in parts])
    texts = [text for part in parts for text in part.texts or ()]
    return Ids(keys, texts or None)
