"""Soft labels as JSON, for people, ``curl`` and other languages: the server and ``logitcache fetch`` share it.

Names are those of `SoftLabels`. What JSON cannot hold: -inf and NaN are null, a fingerprint is 16 hexadecimal digits
(a JSON number loses bits beyond 53). Every other number is exact. Knows nothing of HTTP.
"""

import re
from typing import Any

import numpy as np

from logitcache.labels.errors import InvalidIds, TooManyRows
from logitcache.labels.soft_labels import SoftLabels

MAX_JSON_ROWS = 1024
"""Most rows of one JSON answer: text takes some eight times the bytes, and is made a number at a time."""

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,30}")


def check_json_rows(rows: int) -> None:
    """Refuse a JSON answer of too many rows.

    Raises:
        TooManyRows: above `MAX_JSON_ROWS`.
    """
    if rows > MAX_JSON_ROWS:
        raise TooManyRows(
            f"{rows:,} rows are too many for one JSON answer, which may hold {MAX_JSON_ROWS:,}: split the ids, or ask "
            "for safetensors with `Accept: application/vnd.safetensors`",
            limit=MAX_JSON_ROWS,
            rows=rows,
        )


def parse_id(text: str) -> int:
    """An id as it stands in a path or on a command line.

    Raises:
        InvalidIds: it is not a whole number.
    """
    if not _WHOLE_NUMBER.fullmatch(text):
        raise InvalidIds(f"id {text[:40]!r} is not a whole number")
    return int(text)


def rows_to_json(soft: SoftLabels) -> dict[str, Any]:
    """Soft labels as JSON values: an entry a row in each field, and what holds for all of them.

    Raises:
        TooManyRows: more rows than one JSON answer may hold.
    """
    check_json_rows(len(soft))
    value = {
        "digest": soft.digest,
        "temperatures": list(soft.temperatures),
        "indices": soft.indices.tolist(),
        "logits": _numbers(soft.logits),
        "logit_max": _numbers(soft.logit_max),
        "tail_logsumexp": _numbers(soft.tail_logsumexp),
        "fingerprint": [f"{fingerprint:016x}" for fingerprint in soft.fingerprint.tolist()],
    }
    return value if soft.present is None else value | {"present": soft.present.tolist()}


def example_to_json(id: int, soft: SoftLabels) -> dict[str, Any]:
    """One example for a person to read: its row, and what a row means at each declared temperature.

    ``probabilities`` are those of the stored classes, ``residual_mass`` the rest; one entry a temperature.
    """
    rows = rows_to_json(soft)
    shared = {"id": id, "digest": rows.pop("digest"), "temperatures": rows.pop("temperatures")}
    row = {name: values[0] for name, values in rows.items()}
    return (
        shared
        | row
        | {
            "probabilities": [_numbers(np.exp(soft.log_probs(value))[0]) for value in soft.temperatures],
            "residual_mass": [float(soft.residual_mass(value)[0]) for value in soft.temperatures],
        }
    )


def _numbers(array: np.ndarray) -> list[Any]:
    """Nested lists of the array's numbers, null where one is not finite."""
    values = array.astype(object)
    values[~np.isfinite(array)] = None
    numbers: list[Any] = values.tolist()
    return numbers
