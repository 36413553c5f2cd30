"""A label set behind HTTP, read like one in this process: the reader that implements `LabelSet` over the wire.

It splits what is above the server's limits, asks again when an error will pass, and checks what comes back before
anyone uses it. It knows routes and media types, and nothing of torch or of files.
"""

from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
from jaxtyping import Int64

from logitcache.client.deadline import Deadline
from logitcache.client.response import JSON, check_answer, parse_json, read_body
from logitcache.client.retrying import ask
from logitcache.client.stats import Tally
from logitcache.client.transport import DeadlineTransport
from logitcache.labels import problem, wire
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    InvalidRequest,
    MalformedMessage,
    RowsMissing,
    ServerUnreachable,
    shown,
)
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Description, OnMissing
from logitcache.labels.soft_labels import SoftLabels, concatenate

MAX_TEXT_BYTES = 16 << 20
"""A description or a problem above this is refused; a problem that names 65,536 missing ids takes about 1.5 MB."""


@dataclass(frozen=True)
class _Fetch:
    """What is the same in all parts of one fetch, and the ids of a part."""

    ids: Int64[np.ndarray, " examples"]
    view: int
    on_missing: OnMissing
    deadline: Deadline


class HttpLabelSet:
    """Reader of the label set ``name`` at ``base_url``. Safe to use from several threads; not across a fork.

    Args:
        base_url: what stands before ``/v1/label-sets``, without a trailing slash.
        name: the label set's name.
        timeout_s: total seconds that one call may take, retries and parts included.
        retries: attempts after the first; None means as many as fit into ``timeout_s``.
        transport: replaces the network, for tests.
        tally: where requests and retries are counted.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        *,
        timeout_s: float = 60.0,
        retries: int | None = None,
        transport: httpx.BaseTransport | None = None,
        tally: Tally | None = None,
    ) -> None:
        if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
            raise InvalidRequest(
                f"retries={retries!r} is no count: give 0 for none, or None for as many as time allows"
            )
        self.base_url, self.name = base_url, name
        self._timeout_s, self._retries = timeout_s, retries
        self._tally = tally or Tally()
        self._described: Description | None = None
        if transport is None:
            transport = DeadlineTransport(httpx.create_ssl_context() if base_url.startswith("https:") else None)
        self._client = httpx.Client(transport=transport, headers={"Accept-Encoding": "identity"}, trust_env=False)

    @property
    def url(self) -> str:
        """The address of the label set's description."""
        return f"{self.base_url}/v1/label-sets/{self.name}"

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""
        return self._describe(Deadline(self._timeout_s))

    def fetch(
        self, ids: Any, *, view: int = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> SoftLabels:
        """Soft labels of these examples, as `LabelSet.fetch`; the arrays are views of the bytes that arrived.

        A fetch above the server's limits travels in parts, which all have one digest: if it changes in between, all
        parts are asked for once more.
        """
        call = _Fetch(as_ids(ids), view, on_missing, Deadline(self._timeout_s))
        try:
            return self._fetch_parts(call, digest)
        except DigestChanged:
            if digest is not None or len(call.ids) <= self._rows_a_request(call.deadline):
                raise
            return self._fetch_parts(call, digest)

    def close(self) -> None:
        """Close the connections; arrays that were fetched stay valid."""
        self._client.close()

    def _describe(self, deadline: Deadline) -> Description:
        description = Description.from_json(
            parse_json(self._exchange("GET", self.url, None, JSON, MAX_TEXT_BYTES, deadline))
        )
        if description.name != self.name:
            raise MalformedMessage(f"{self.url} describes {description.name[:80]!r}: is that a logitcache server?")
        self._described = description
        return description

    def _known(self, deadline: Deadline) -> Description:
        """The description as it was read last; read once if it never was."""
        return self._described or self._describe(deadline)

    def _rows_a_request(self, deadline: Deadline) -> int:
        description = self._known(deadline)
        return description.limits.rows_a_fetch(description.row_spec.row_bytes)

    def _fetch_parts(self, call: "_Fetch", digest: str | None) -> SoftLabels:
        size = self._rows_a_request(call.deadline)
        parts: list[SoftLabels] = []
        missing: list[RowsMissing] = []
        for begin in range(0, len(call.ids), size):
            part = replace(call, ids=call.ids[begin : begin + size])
            try:
                parts.append(self._fetch_part(part, parts[0].digest if parts else digest))
            except RowsMissing as error:
                # The other parts are still asked for, so that the error names all ids, as a local label set's does.
                missing.append(error)
        if missing:
            raise missing[0] if len(call.ids) <= size else self._all_missing(missing, call)
        for rows in parts:
            self._check_digest(rows, parts[0].digest)
        return concatenate(parts)

    def _fetch_part(self, call: "_Fetch", digest: str | None) -> SoftLabels:
        url, asked = f"{self.url}/fetch", len(call.ids)
        request = wire.encode_ids(call.ids, view=call.view, digest=digest, on_missing=call.on_missing)
        described = self._known(call.deadline)
        most_bytes = asked * (described.row_spec.row_bytes + 1) + wire.MAX_HEADER_BYTES + 8
        soft = wire.decode_rows(self._exchange("POST", url, request, wire.MEDIA_TYPE, most_bytes, call.deadline))
        if len(soft) != asked:
            raise MalformedMessage(f"{url} answered with {len(soft):,} rows for {asked:,} ids; nothing of it was used")
        self._check_rows(soft, described, call.on_missing)
        if digest is not None:
            self._check_digest(soft, digest)
        return soft

    def _check_rows(self, soft: SoftLabels, described: Description, on_missing: OnMissing) -> None:
        """Refuse rows that are not what the description says, before anyone trains on them."""
        spec, classes = described.row_spec, described.identity.classes
        found = (soft.indices.shape[1], soft.indices.dtype, soft.logits.dtype, soft.temperatures)
        if found != (spec.k, np.dtype(spec.index_dtype), np.dtype(spec.dtype), spec.temperatures):
            raise DigestChanged(
                f"{self.url} sends rows of another shape than it described (k, dtypes, temperatures: {found}): "
                "another label set stands there now; connect again to take it",
                served=soft.digest,
            )
        if (soft.present is not None) != (on_missing == "mask"):
            raise MalformedMessage(f"{self.url} sends a mask that was not asked for, or none where it was")
        largest = int(soft.indices.max(initial=0))
        if largest >= classes:
            raise MalformedMessage(f"{self.url} sends class {largest:,} of a teacher with {classes:,} classes")

    def _check_digest(self, soft: SoftLabels, digest: str | None) -> None:
        if soft.digest != digest:
            raise DigestChanged(
                f"{self.url} serves {soft.digest or 'an unfinished label set'} where "
                f"{digest or 'an unfinished label set'} was expected; "
                "connect again without a digest to take what is there",
                expected=digest,
                served=soft.digest,
            )

    def _all_missing(self, parts: list[RowsMissing], call: "_Fetch") -> RowsMissing:
        unknown = list(dict.fromkeys(missing for part in parts for missing in part.unknown))
        unlabelled = list(dict.fromkeys(missing for part in parts for missing in part.unlabelled))
        told = []
        if unknown:
            told.append(f"unknown: {shown(unknown)}; its ids are 0 to {self._known(call.deadline).examples - 1:,}")
        if unlabelled:
            told.append(f"without labels: {shown(unlabelled)}; run its precompute again")
        return RowsMissing(
            f"{len(unknown) + len(unlabelled):,} of {len(np.unique(call.ids)):,} examples have no labels in "
            f"{self.name!r}: {'; '.join(told)}",
            unknown=unknown,
            unlabelled=unlabelled,
        )

    def _exchange(
        self, method: str, url: str, content: bytes | None, accept: str, most_bytes: int, deadline: Deadline
    ) -> bytearray:
        """The body of a successful answer of the media type ``accept``; see `retrying.ask` for what is tried again."""
        self._tally.count(requests=1)
        return ask(
            lambda: self._attempt(method, url, content, accept, most_bytes, deadline),
            url=url,
            deadline=deadline,
            retries=self._retries,
            on_retry=lambda: self._tally.count(retries=1),
        )

    def _attempt(
        self, method: str, url: str, content: bytes | None, accept: str, most_bytes: int, deadline: Deadline
    ) -> bytearray:
        if not deadline.remaining_s:
            raise DeadlineExceeded(f"{url} was not asked: the {deadline.timeout_s:g} s allowed for the call are over")
        headers = {"Accept": f"{accept}, {problem.MEDIA_TYPE}"}
        if content is not None:
            headers["Content-Type"] = accept
        request = self._client.build_request(
            method, url, content=content, headers=headers, timeout=httpx.Timeout(deadline.remaining_s)
        )
        try:
            with deadline.applied():
                response = self._client.send(request, stream=True)
                try:
                    body = read_body(response, most_bytes if response.is_success else MAX_TEXT_BYTES, deadline)
                finally:
                    response.close()
        except RuntimeError as error:
            if self._client.is_closed:
                raise InvalidRequest(f"the connection to {self.url} was closed meanwhile: connect again") from error
            raise
        except httpx.ConnectError as error:
            raise ServerUnreachable(
                f"cannot connect to {self.base_url}: {error}; is `logitcache serve` running there?"
            ) from error
        except httpx.TimeoutException as error:
            raise ServerUnreachable(f"{url} did not answer in time; is the server overloaded?") from error
        except httpx.TransportError as error:
            raise ServerUnreachable(
                f"the connection to {self.base_url} broke: {error}; is `logitcache serve` still running there?"
            ) from error
        check_answer(response, body, accept)
        return body
