"""What OpenAPI cannot read off the routes' signatures: two media types a body, keys, and problems as answers.

Of each operation exactly those statuses are told that it can give, besides what is no answer of an operation; see
`ABOUT`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, create_model

from logitcache.labels import label_set
from logitcache.labels.identity import NAME_PATTERN
from logitcache.labels.problem import MEDIA_TYPE as PROBLEM
from logitcache.labels.recorded import Stand
from logitcache.server.http.messages import JSON, SAFETENSORS, FetchBody, MissingBody
from logitcache.server.jobs.folder import JOB_ID
from logitcache.server.jobs.job import Asked, JobState

Responses = dict[int | str, dict[str, Any]]

ABOUT = """Every error is a problem (RFC 9457) with a stable `code`. Besides the statuses of each operation, the server
answers 404 where there is no route, 405 to another method, 400 to what is no HTTP/1.1, 408 to a request that does not
come in time, and 503 to a connection too many."""

Name = Annotated[str, Path(description="Of a label set.", json_schema_extra={"pattern": NAME_PATTERN})]

JobId = Annotated[str, Path(description="Of a job.", json_schema_extra={"pattern": f"^{JOB_ID.pattern}$"})]


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

_TOLD: Mapping[int, str] = {
    400: "The body does not parse.",
    401: "The server wants a key, and was sent none that it knows.",
    403: "The key may do less than this, or the server does not record.",
    404: "Nothing has this name or id, or some ids have no labels: see `code`.",
    406: "`Accept` allows neither JSON nor safetensors.",
    409: "What is there is not what is meant, or it is held by another: see `code`.",
    413: "The body is longer, or the answer would be larger, than one may be.",
    415: "The body is of another media type, or compressed.",
    421: "The server does not go by the name in `Host`.",
    422: "The request says something that cannot be.",
    500: "What is stored cannot be read, or the server failed: its log has the reason.",
    503: "Too much is under way, or the store or its keys are away: the same request can succeed later.",
    507: "No space is left: nothing of this was written.",
}

_HEADERS: Mapping[int, Mapping[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}},
    503: {
        "Retry-After": {
            "required": True,
            "description": "Seconds after which to ask again.",
            "schema": {"type": "integer", "minimum": 0},
        }
    },
}


def problems(*statuses: int) -> Responses:
    """The problems under these statuses, as answers."""
    content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": _TOLD[status], "content": content, "headers": _HEADERS.get(status, {})}
        for status in statuses
    }


OF_READING = problems(401, 421, 500, 503)
"""Of every route that needs a key: any key may read."""

OF_WRITING = OF_READING | problems(403)
"""Of every route that needs a key which may do more."""

METRICS_ANSWER = OF_READING | {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
}

OF_BODIES = problems(400, 413, 415, 422)
"""Of every route that reads a body."""


def completed(api: dict[str, Any]) -> dict[str, Any]:
    """What the framework made of the routes, with problems, with keys, and without what it adds of its own."""
    parts = api["components"]
    parts["schemas"]["Problem"] = Problem.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(unused, None)
    told = "A key that `logitcache keys make` made; servers may be run without."
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": told}}
    for operation in (operation for path in api["paths"].values() for operation in path.values()):
        responses = operation["responses"]
        if "HTTPValidationError" in str(responses.get("422")):
            del responses["422"]
        if "401" in responses:
            operation["security"] = [{"key": []}]
    return api


def _body(model: type[BaseModel], options: str) -> dict[str, Any]:
    """A body in JSON, or in safetensors with these options as metadata."""
    told = (
        "JSON, or safetensors with an array `ids`: int64, or for text ids uint64 (ids, 2), the high and the low half "
        f"of each text's XXH3-128. {options}"
    )
    content = {JSON: {"schema": model.model_json_schema()}, SAFETENSORS: _BYTES}
    return {"requestBody": {"required": True, "description": told, "content": content}}


_DIGEST = {
    "Logitcache-Digest": {"description": "Digest of the content served, once sealed.", "schema": {"type": "string"}}
}

FETCH_BODY = _body(FetchBody, "`rows` is an int64 array (ids, 2) there; view, digest and on_missing are its metadata.")

_OF_BATCHES = OF_BODIES | problems(404, 406, 409)

FETCH_ANSWER: Responses = _OF_BATCHES | {
    200: {
        "description": "Soft labels; safetensors or JSON as Accept says, else as the request came.",
        "model": Rows,
        "content": {SAFETENSORS: _BYTES},
        "headers": _DIGEST,
    }
}

MISSING_BODY = _body(MissingBody, "digest is its metadata.")

MISSING_ANSWER: Responses = _OF_BATCHES | {
    200: {
        "description": "JSON, or safetensors with one uint8 array `state`: 0 labelled, 1 unlabelled, 2 unknown.",
        "model": Missing,
        "content": {SAFETENSORS: _BYTES},
    }
}

EXAMPLE_ANSWER: Responses = problems(404, 409, 413, 422) | {200: {"model": Example | CausalExample, "headers": _DIGEST}}

LIST_ANSWER: Responses = {200: {"model": list[Description]}}  # type: ignore[valid-type]

DESCRIPTION_ANSWER: Responses = problems(404, 409, 422) | {200: {"model": Description}}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """A body in JSON alone."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


JOB_BODY = json_body(Asked)

CANCEL_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Anything, as JSON: that it is said to be is what a form on somebody's page cannot do.",
        "content": {JSON: {"schema": {}}},
    }
}

_LOCATION = {"Location": {"required": True, "description": "Where to ask how it stands.", "schema": {"type": "string"}}}

JOB_ANSWER: Responses = (
    OF_BODIES
    | problems(507)
    | {
        200: {
            "description": "The same was asked for before: this is that job.",
            "model": JobState,
            "headers": _LOCATION,
        },
        202: {"description": "Queued.", "model": JobState, "headers": _LOCATION},
    }
)


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

_OF_RECORDING = OF_BODIES | problems(404, 409, 507)

RECORD_ANSWER: Responses = _OF_RECORDING | {200: {"model": Recorded}}

STAND_ANSWER: Responses = _OF_RECORDING | {200: {"model": Stand}}
