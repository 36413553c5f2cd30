"""A body of JSON as a model has it, or what pydantic complains of, as one error of ours that names each field.

Where a model has alternatives, their `pydantic.Tag` stands in angle brackets: pydantic puts it among the names of the
field, and the client wrote none such. Knows nothing of HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from logitcache.labels.errors import SHOWN, InvalidIds, InvalidRequest, RequestRefused

_Body = TypeVar("_Body", bound=BaseModel)


def parse_json(model: type[_Body], body: bytes) -> _Body:
    """A body of JSON as the model has it.

    Raises:
        RequestRefused: the body is not JSON.
        InvalidIds, InvalidRequest: it says something that cannot be; each field is named.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise RequestRefused(f"the body is not JSON: {found[0]['msg'].partition(': ')[2]}") from None
        raise invalid_request(found) from None


def invalid_request(errors: Iterable[Mapping[str, Any]]) -> InvalidRequest:
    """pydantic's complaints as one error that names each field: `InvalidIds` when they are all about ids."""
    fields = [{"field": _field(error["loc"]), "problem": str(error["msg"])} for error in errors]
    told = "; ".join(f"{field['field'] or 'body'}: {field['problem']}" for field in fields[:SHOWN])
    if len(fields) > SHOWN:
        told += f"; and {len(fields) - SHOWN:,} more"
    about_ids = all(field["field"].split(".")[0] == "ids" for field in fields)
    return (InvalidIds if about_ids else InvalidRequest)(told, fields=fields[:100])


def _field(place: Sequence[int | str]) -> str:
    """Name of a field as the client wrote it: the framework puts where it stood in front, pydantic the alternative."""
    return ".".join(str(part) for part in place if part not in ("body", "query", "path") and str(part)[:1] != "<")
