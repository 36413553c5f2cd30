"""What OpenAPI cannot read off the routes' signatures: two media types a body, and problems as answers."""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from logitcache.labels import label_set
from logitcache.labels.problem import MEDIA_TYPE as PROBLEM
from logitcache.labels.recorded import Stand
from logitcache.server.http.messages import JSON, SAFETENSORS, FetchBody, MissingBody
from logitcache.server.jobs.job import Asked, JobState

Responses = dict[int | str, dict[str, Any]]


class Problem(BaseModel):
    """An error as RFC 9457 problem details; some codes carry further members."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:logitcache:problem:rows-missing"])
    title: str
    status: int
    detail: str = Field(description="What is wrong, and what to do.")
    code: str = Field(description="Stable: branch on this.", examples=["rows-missing"])
    retry: bool = Field(description="Whether the same request can succeed later.")
    request_id: str | None
    retry_after_s: float | None = None


_DESCRIBED: dict[str, Any] = {field.name: (field.type, ...) for field in fields(label_set.Description)} | {
    "digest": (str | None, Field(description="Digest of the newest generation: what is served unless told.")),
    "generation": (int | None, Field(description="Number of the newest generation.")),
}

Description = create_model("Description", __doc__=label_set.Description.__doc__, **_DESCRIBED)


class Rows(BaseModel):
    """Soft labels: an entry a row in each field, unless told otherwise. null stands for -inf, for a target that is
    none, or for a row that is not present."""

    digest: str | None
    temperatures: list[float]
    indices: list[list[int]]
    logits: list[list[float | None]]
    logit_max: list[float | None]
    tail_logsumexp: list[list[float | None]]
    fingerprint: list[str] = Field(description="16 hexadecimal digits an example.")
    row_splits: list[int] | None = Field(
        None, description="Causal label sets: example i has the rows from row_splits[i] to row_splits[i + 1]."
    )
    tokens: list[int] | None = Field(None, description="Causal label sets: the token of each row.")
    target: list[int | None] | None = Field(None, description="Where the dataset gave targets: the class.")
    target_logit: list[float | None] | None = Field(None, description="The teacher's centred logit of the target.")
    present: list[bool] | None = Field(None, description='One an example; only with on_missing="mask".')


class Example(BaseModel):
    """One example of one row, and at each declared temperature the probabilities of its stored classes."""

    id: int | str
    digest: str | None
    temperatures: list[float]
    fingerprint: str
    indices: list[int]
    logits: list[float | None]
    logit_max: float | None
    tail_logsumexp: list[float | None]
    target: int | None = None
    target_logit: float | None = None
    probabilities: list[list[float | None]] = Field(description="One list a temperature.")
    residual_mass: list[float | None] = Field(
        description="One number a temperature: probability outside the stored classes."
    )


class CausalExample(BaseModel):
    """One example with a row a token: an entry a row in each field."""

    id: int | str
    digest: str | None
    temperatures: list[float]
    fingerprint: str
    tokens: list[int]
    indices: list[list[int]]
    logits: list[list[float | None]]
    logit_max: list[float | None]
    tail_logsumexp: list[list[float | None]]
    target: list[int | None] | None = None
    target_logit: list[float | None] | None = None
    probabilities: list[list[list[float | None]]] = Field(description="For each temperature an entry a row.")
    residual_mass: list[list[float | None]] = Field(description="For each temperature an entry a row.")


class Missing(BaseModel):
    """Which of the ids asked for have no labels, in the order asked for, once each."""

    unknown: list[int | str] = Field(description="The label set has no such example.")
    unlabelled: list[int | str] = Field(description="Not labelled yet, or withdrawn as damaged.")


_BYTES = {"schema": {"type": "string", "format": "binary"}}

PROBLEMS: Responses = {
    "default": {"description": "A problem", "content": {PROBLEM: {"schema": Problem.model_json_schema()}}}
}


def _body(model: type[BaseModel], options: str) -> dict[str, Any]:
    """A body in JSON, or in safetensors with these options as metadata."""
    told = (
        "JSON, or safetensors with an array `ids`: int64, or for text ids uint64 (ids, 2), the high and the low half "
        f"of each text's XXH3-128. {options}"
    )
    content = {JSON: {"schema": model.model_json_schema()}, SAFETENSORS: _BYTES}
    return {"requestBody": {"required": True, "description": told, "content": content}}


FETCH_BODY = _body(FetchBody, "`rows` is an int64 array (ids, 2) there; view, digest and on_missing are its metadata.")

FETCH_ANSWER: Responses = {
    200: {
        "description": "Soft labels; safetensors or JSON as Accept says, else as the request came.",
        "model": Rows,
        "content": {SAFETENSORS: _BYTES},
        "headers": {
            "Logitcache-Digest": {"description": "Digest of the content served.", "schema": {"type": "string"}}
        },
    }
}

MISSING_BODY = _body(MissingBody, "digest is its metadata.")

MISSING_ANSWER: Responses = {
    200: {
        "description": "JSON, or safetensors with one uint8 array `state`: 0 labelled, 1 unlabelled, 2 unknown.",
        "model": Missing,
        "content": {SAFETENSORS: _BYTES},
    }
}

EXAMPLE_ANSWER: Responses = {200: {"model": Example | CausalExample}}

LIST_ANSWER: Responses = {200: {"model": list[Description]}}  # type: ignore[valid-type]

DESCRIPTION_ANSWER: Responses = {200: {"model": Description}}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """A body in JSON alone."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


JOB_BODY = json_body(Asked)

_LOCATION = {"Location": {"description": "Where to ask how it stands.", "schema": {"type": "string"}}}

JOB_ANSWER: Responses = {
    200: {"description": "The same was asked for before: this is that job.", "model": JobState, "headers": _LOCATION},
    202: {"description": "Queued.", "model": JobState, "headers": _LOCATION},
}


class Recorded(BaseModel):
    """How many rows were made durable."""

    rows: int


RECORD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Safetensors with the arrays of soft labels, and one entry an example in `ids` (as in a fetch), "
        "`view` and `step` (int64); rank, sitting and temperatures are its metadata.",
        "content": {SAFETENSORS: _BYTES},
    }
}

RECORD_ANSWER: Responses = {200: {"model": Recorded}}

STAND_ANSWER: Responses = {200: {"model": Stand}}
