"""What pydantic complains of, as one error of ours that names each field. Knows nothing of HTTP."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from logitcache.labels.errors import SHOWN, InvalidIds, InvalidRequest


def invalid_request(errors: Iterable[Mapping[str, Any]]) -> InvalidRequest:
    """pydantic's complaints as one error that names each field: `InvalidIds` when they are all about ids."""
    fields = [{"field": _field(error["loc"]), "problem": str(error["msg"])} for error in errors]
    told = "; ".join(f"{field['field'] or 'body'}: {field['problem']}" for field in fields[:SHOWN])
    if len(fields) > SHOWN:
        told += f"; and {len(fields) - SHOWN:,} more"
    about_ids = all(field["field"].split(".")[0] == "ids" for field in fields)
    return (InvalidIds if about_ids else InvalidRequest)(told, fields=fields[:100])


def _field(place: Sequence[int | str]) -> str:
    """Name of a field as the client wrote it: the framework puts where it stood in front."""
    return ".".join(str(part) for part in place if part not in ("body", "query", "path"))
