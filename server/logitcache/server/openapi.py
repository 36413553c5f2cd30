"""What OpenAPI cannot read off the routes' signatures: two media types a body, and problems as answers."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from logitcache.labels.problem import MEDIA_TYPE as PROBLEM
from logitcache.server.jobs.job import Asked, JobState
from logitcache.server.messages import JSON, SAFETENSORS, FetchBody

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


class Rows(BaseModel):
    """Soft labels: an entry a row in each field. null stands for -inf, or for a row that is not present."""

    digest: str | None
    temperatures: list[float]
    indices: list[list[int]]
    logits: list[list[float | None]]
    logit_max: list[float | None]
    tail_logsumexp: list[list[float | None]]
    fingerprint: list[str] = Field(description="16 hexadecimal digits each.")
    present: list[bool] | None = Field(None, description='Only with on_missing="mask".')


class Example(BaseModel):
    """One example: its row, and at each declared temperature the probabilities of its stored classes."""

    id: int
    digest: str | None
    temperatures: list[float]
    indices: list[int]
    logits: list[float | None]
    logit_max: float | None
    tail_logsumexp: list[float | None]
    fingerprint: str
    probabilities: list[list[float | None]] = Field(description="One list a temperature.")
    residual_mass: list[float] = Field(description="One number a temperature: probability outside the stored classes.")


_BYTES = {"schema": {"type": "string", "format": "binary"}}

PROBLEMS: Responses = {
    "default": {"description": "A problem", "content": {PROBLEM: {"schema": Problem.model_json_schema()}}}
}

FETCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSON, or safetensors with one int64 array `ids` and view, digest and on_missing as metadata.",
        "content": {JSON: {"schema": FetchBody.model_json_schema()}, SAFETENSORS: _BYTES},
    }
}

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

EXAMPLE_ANSWER: Responses = {200: {"model": Example}}

JOB_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {JSON: {"schema": Asked.model_json_schema()}}}}

_LOCATION = {"Location": {"description": "Where to ask how it stands.", "schema": {"type": "string"}}}

JOB_ANSWER: Responses = {
    200: {"description": "The same was asked for before: this is that job.", "model": JobState, "headers": _LOCATION},
    202: {"description": "Queued.", "model": JobState, "headers": _LOCATION},
}
