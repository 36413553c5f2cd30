"""Soft labels as JSON, for people, ``curl`` and other languages: the server and ``logitcache fetch`` share it.

Names are those of `SoftLabels`. What JSON cannot hold: -inf and NaN are null, and so is a target that is none; a
fingerprint is 16 hexadecimal digits (a JSON number loses bits beyond 53). Every other number is exact. Knows nothing of
HTTP.
"""

import re
from typing import Any

import numpy as np

from logitcache.labels.errors import InvalidIds, InvalidRequest, TooManyRows
from logitcache.labels.ids import IdKind, as_ids
from logitcache.labels.label_set import Limits
from logitcache.labels.soft_labels import RowSpec, SoftLabels
from logitcache.storage import Readable

MAX_JSON_ROWS = 1024
"""Most examples, and most rows, of one JSON answer: text takes some eight times the bytes, and is made a number at a
time."""

MAX_JSON_NUMBERS = 1 << 18
"""Logits, probabilities and scalars of one JSON answer: as many take a quarter of a second, during which nothing else
runs. A single row may have four times as many."""

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,30}")
_RANGE = re.compile(r"([0-9]{1,18}):([0-9]{1,18})")


def fetch_rows(label_set: Readable, ids: Any, *, probabilities: bool = False, **options: Any) -> SoftLabels:
    """Rows that one JSON answer can hold, with their ``probabilities`` or without; more are refused before they are
    gathered.

    Raises:
        TooManyRows: above `most_rows`.
    """
    ids, spec = as_ids(ids), label_set.row_spec
    most = most_rows(spec, probabilities)
    _check_size(len(ids), "ids", most)
    try:
        return label_set.fetch(ids, limits=Limits(most, spec.nbytes(most, len(ids))), **options)
    except TooManyRows as error:
        _check_size(error.details.get("rows", 0), "rows", most)
        raise


def most_rows(spec: RowSpec, probabilities: bool) -> int:
    """Rows that one JSON answer can hold: `MAX_JSON_ROWS`, fewer where they have many numbers; of the longest none."""
    numbers = numbers_a_row(spec, probabilities)
    return min(MAX_JSON_ROWS, MAX_JSON_NUMBERS // numbers) or int(numbers <= 4 * MAX_JSON_NUMBERS)


def numbers_a_row(spec: RowSpec, probabilities: bool) -> int:
    """Numbers of a row in JSON, its indices not counted."""
    each = spec.k + len(spec.columns)
    return each + len(spec.temperatures) * (spec.k + 1) if probabilities else each


def _check_size(count: int, noun: str, most: int) -> None:
    if count > most:
        raise TooManyRows(
            f"{count:,} {noun} are too many for one JSON answer, which may hold {most:,} of this label set: split the "
            "ids, ask for fewer rows of each where they have many, or for safetensors with "
            "`POST /v1/label-sets/NAME/fetch` and `Accept: application/vnd.safetensors`",
            limit=most,
            rows=count,
        )


def parse_id(text: str, kind: IdKind) -> int | str:
    """An id as it stands in a path or on a command line, for a label set with ids of this kind.

    Raises:
        InvalidIds: it is not a whole number, and ids are.
    """
    if kind == "text":
        return text
    if not is_whole_number(text):
        raise InvalidIds(f"id {text[:40]!r} is not a whole number")
    return int(text)


def is_whole_number(text: str) -> bool:
    """The text is a whole number in decimal digits, and could be an id."""
    return bool(_WHOLE_NUMBER.fullmatch(text))


def parse_rows(text: str | None) -> tuple[int, int] | None:
    """A range of rows as it stands in a path or on a command line, ``START:STOP``.

    Raises:
        InvalidRequest: it is something else.
    """
    if text is None:
        return None
    if (found := _RANGE.fullmatch(text)) is None:
        raise InvalidRequest(f"rows: {text[:40]!r} is no range; write START:STOP, such as 0:512")
    return int(found[1]), int(found[2])


def rows_to_json(soft: SoftLabels) -> dict[str, Any]:
    """Soft labels as JSON values: an entry a row, or an example, in each field, and what holds for all of them."""
    value = {
        "digest": soft.digest,
        "temperatures": list(soft.temperatures),
        "indices": soft.indices.tolist(),
        "logits": _numbers(soft.logits),
        "logit_max": _numbers(soft.logit_max),
        "tail_logsumexp": _numbers(soft.tail_logsumexp),
        "fingerprint": [f"{fingerprint:016x}" for fingerprint in soft.fingerprint.tolist()],
    }
    if soft.row_splits is not None and soft.tokens is not None:
        value |= {"row_splits": soft.row_splits.tolist(), "tokens": soft.tokens.tolist()}
    if soft.target is not None and soft.target_logit is not None:
        target = [None if number < 0 else number for number in soft.target.tolist()]
        value |= {"target": target, "target_logit": _numbers(soft.target_logit)}
    return value if soft.present is None else value | {"present": soft.present.tolist()}


def example_to_json(id: int | str, soft: SoftLabels) -> dict[str, Any]:
    """One example for a person to read: its row, and what a row means at each declared temperature.

    ``probabilities`` are those of the stored classes, ``residual_mass`` the rest; one entry a temperature. Where the
    example has a row a token, each field but its fingerprint has an entry a row.
    """
    rows = rows_to_json(soft)
    shared = {"id": id, "digest": rows.pop("digest"), "temperatures": rows.pop("temperatures")}
    shared["fingerprint"] = rows.pop("fingerprint")[0]
    ragged = rows.pop("row_splits", None) is not None
    rows = rows | {
        "probabilities": [_numbers(np.exp(soft.log_probs(value))) for value in soft.temperatures],
        "residual_mass": [_numbers(soft.residual_mass(value)) for value in soft.temperatures],
    }
    if ragged:
        return shared | rows
    per_temperature = {"probabilities", "residual_mass"}
    return shared | {
        name: [entry[0] for entry in values] if name in per_temperature else values[0] for name, values in rows.items()
    }


def _numbers(array: np.ndarray) -> list[Any]:
    """Nested lists of the array's numbers, null where one is not finite."""
    values = array.astype(object)
    values[~np.isfinite(array)] = None
    numbers: list[Any] = values.tolist()
    return numbers
