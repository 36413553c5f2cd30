"""A label set behind HTTP, read like one in this process: the reader that implements `LabelSet` over the wire.

It splits what is above the server's limits, asks again when an error will pass, and checks what comes back before
anyone uses it. It knows routes and media types, and nothing of torch or of files.
"""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from logitcache.client.answers import check_digest, check_rows, decode_states
from logitcache.client.connecting import AnswerLate, ConnectFailed, HostUnknown, ServerUntrusted
from logitcache.client.deadline import Deadline
from logitcache.client.part_errors import all_missing, all_outside, with_texts
from logitcache.client.response import JSON, check_answer, parse_json
from logitcache.client.retrying import ask
from logitcache.client.stats import Tally
from logitcache.client.transport import (
    MAX_TEXT_BYTES,
    AnswerTooLong,
    ConnectionBroke,
    DirectTransport,
    Transport,
)
from logitcache.labels import problem, wire
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    HostNotFound,
    InvalidRequest,
    LogitcacheError,
    MalformedMessage,
    RangeOutside,
    RowsMissing,
    ServerUnreachable,
    TooManyRows,
    UntrustedServer,
)
from logitcache.labels.identity import check_name
from logitcache.labels.ids import Ids, as_ids, check_kind
from logitcache.labels.label_set import Description, OnMissing
from logitcache.labels.ranges import Ranges, as_ranges
from logitcache.labels.soft_labels import SoftLabels, concatenate
from logitcache.labels.views import Views, as_views

KEY_VARIABLE = "LOGITCACHE_KEY"
"""Of the environment: the key of the servers that a process asks, where its code does not say one."""


@dataclass(frozen=True)
class _Fetch:
    """What is the same in all parts of one fetch, and the ids and ranges of a part."""

    ids: Ids
    ranges: Ranges | None
    view: Views
    on_missing: OnMissing
    deadline: Deadline

    def part(self, begin: int, size: int) -> "_Fetch":
        """The fetch of ``size`` of its examples."""
        part = slice(begin, begin + size)
        ranges = None if self.ranges is None else self.ranges[part]
        view = self.view[part] if isinstance(self.view, np.ndarray) else self.view
        return replace(self, ids=self.ids[part], ranges=ranges, view=view)


class HttpLabelSet:
    """Reader of the label set ``name`` at ``base_url``. Safe to use from several threads; not across a fork.

    Args:
        base_url: what stands before ``/v1/label-sets``, percent-encoded, without a trailing slash.
        name: the label set's name.
        timeout_s: total seconds that one call may take, retries and parts included.
        retries: attempts after the first; None means as many as fit into ``timeout_s``.
        key: of the server, if it wants one; else that of the environment's `KEY_VARIABLE`, if it has one.
        transport: in place of connections of its own; `httpx_transport.HttpxTransport` makes one of any of httpx.
        tally: where requests and retries are counted.

    Raises:
        InvalidName: ``name`` cannot be a label set's name.
        InvalidRequest: ``base_url`` is not percent-encoded, ``retries`` is no count, or no key is like that.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        *,
        timeout_s: float = 60.0,
        retries: int | None = None,
        key: str | None = None,
        transport: Transport | None = None,
        tally: Tally | None = None,
    ) -> None:
        if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
            raise InvalidRequest(
                f"retries={retries!r} is no count: give 0 for none, or None for as many as time allows"
            )
        if not re.fullmatch(r"[!-~]+", base_url):
            raise InvalidRequest(f"base_url={base_url!r} is not percent-encoded; `connect` takes it as it is")
        self.base_url, self.name = base_url, check_name(name)
        self._path = f"/v1/label-sets/{name}"
        self.url = base_url + self._path
        """The address of the label set's description."""
        self._timeout_s, self._retries = timeout_s, retries
        self._authorization = _authorization(key)
        self._tally = tally or Tally()
        self._described: Description | None = None
        self._examples_a_part: int | None = None
        self._transport = transport or _own_transport(base_url)
        self._closed = False

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""
        return self._describe(Deadline(self._timeout_s))

    def fetch(
        self, ids: Any, *, rows: Any = None, view: Any = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> SoftLabels:
        """Soft labels of these examples, as `LabelSet.fetch`; the arrays are views of the bytes that arrived.

        A fetch above the server's limits travels in parts, which all have one digest: if it changes in between, all
        parts are asked for once more. Where examples have many rows, parts are halved until their answers fit.
        """
        wanted = as_ids(ids)
        ranges = None if rows is None else as_ranges(rows, len(wanted))
        deadline = Deadline(self._timeout_s)
        identity = self._known(deadline).identity
        check_kind(wanted, identity.ids, self.name)
        views = as_views(view, wanted, identity.views, self.name)
        call = _Fetch(wanted, ranges, views, on_missing, deadline)
        try:
            return self._fetch_parts(call, digest)
        except DigestChanged:
            if digest is not None or len(wanted) <= self._part_size(call.deadline):
                raise
            return self._fetch_parts(call, digest)

    def states(self, ids: Any, *, digest: str | None = None) -> UInt8[np.ndarray, " ids"]:
        """For each id `LABELLED`, `UNLABELLED` or `UNKNOWN`, as `LabelSet.states`; many ids travel in parts."""
        wanted, deadline = as_ids(ids), Deadline(self._timeout_s)
        described = self._known(deadline)
        check_kind(wanted, described.identity.ids, self.name)
        size = described.limits.examples_a_fetch(described.row_spec)
        parts = []
        for begin in range(0, len(wanted), size):
            part = wanted[begin : begin + size]
            request = wire.encode_ids(part, digest=digest)
            most_bytes = len(part) + wire.MAX_HEADER_BYTES + 8
            body = self.exchange("POST", "/missing", request, wire.MEDIA_TYPE, most_bytes, deadline)
            parts.append(decode_states(body, len(part), f"{self.url}/missing"))
        return np.concatenate(parts)

    def close(self) -> None:
        """Close the connections; arrays that were fetched stay valid."""
        self._closed = True
        self._transport.close()

    def _describe(self, deadline: Deadline) -> Description:
        description = Description.from_json(parse_json(self.exchange("GET", "", None, JSON, MAX_TEXT_BYTES, deadline)))
        if description.name != self.name:
            raise MalformedMessage(f"{self.url} describes {description.name[:80]!r}: is that a logitcache server?")
        self._described = description
        return description

    def _known(self, deadline: Deadline) -> Description:
        """The description as it was read last; read once if it never was."""
        return self._described or self._describe(deadline)

    def _part_size(self, deadline: Deadline) -> int:
        """Examples to ask for at once: what the limits allow, or what an answer was found to hold."""
        described = self._known(deadline)
        most = described.limits.examples_a_fetch(described.row_spec)
        return most if self._examples_a_part is None else min(most, self._examples_a_part)

    def _fetch_parts(self, call: _Fetch, digest: str | None) -> SoftLabels:
        parts: list[SoftLabels] = []
        missing: list[RowsMissing] = []
        outside: list[RangeOutside] = []
        begin = 0
        while begin < len(call.ids):
            part = call.part(begin, self._part_size(call.deadline))
            try:
                parts.append(self._fetch_part(part, parts[0].digest if parts else digest))
            # The other parts are still asked for, so that the error names all ids, as a local label set's does.
            except RowsMissing as error:
                missing.append(error)
            except RangeOutside as error:
                outside.append(error)
            except TooManyRows:
                if len(part.ids) == 1:
                    raise
                self._examples_a_part = len(part.ids) // 2
                continue
            begin += len(part.ids)
        if missing and len(part.ids) < len(call.ids):
            raise all_missing(missing, call.ids, self._describe(call.deadline), digest)
        if missing or outside:
            raise missing[0] if missing else all_outside(outside)
        for rows in parts:
            check_digest(rows, parts[0].digest, self.url)
        return concatenate(parts)

    def _fetch_part(self, part: _Fetch, digest: str | None) -> SoftLabels:
        described = self._known(part.deadline)
        most_bytes = self._most_bytes(part, described)
        request = wire.encode_ids(part.ids, part.ranges, view=part.view, digest=digest, on_missing=part.on_missing)
        try:
            body = self.exchange("POST", "/fetch", request, wire.MEDIA_TYPE, most_bytes, part.deadline)
        except LogitcacheError as error:
            raise with_texts(error, part.ids) from error.__cause__
        soft = wire.decode_rows(body)
        masked = part.on_missing == "mask"
        check_rows(soft, described, self.url, examples=len(part.ids), ranges=part.ranges, masked=masked)
        if digest is not None:
            check_digest(soft, digest, self.url)
        self._note_size(soft, described)
        return soft

    def _most_bytes(self, part: _Fetch, described: Description) -> int:
        """Bytes that the answer to this part may have, header included.

        Raises:
            TooManyRows: so many rows are asked for that the server would refuse.
        """
        spec, examples, rows = described.row_spec, len(part.ids), len(part.ids)
        if spec.ragged and part.ranges is not None:
            rows = int((part.ranges[:, 1] - part.ranges[:, 0]).sum())
            described.limits.check(spec, examples, rows)
        size = spec.nbytes(rows, examples)
        if spec.ragged and part.ranges is None:
            size = max(described.limits.response_bytes, size)
        # A mask has a byte an example, and row_splits have one more entry than there are examples.
        return size + examples + 8 + wire.MAX_HEADER_BYTES + 8

    def _note_size(self, soft: SoftLabels, described: Description) -> None:
        """Ask for more examples at once again, where an answer of as many as we dared was far below the limit."""
        spec = described.row_spec
        size = spec.nbytes(len(soft), soft.examples)
        if soft.examples == self._examples_a_part and 4 * size < described.limits.response_bytes:
            self._examples_a_part = 2 * soft.examples

    def exchange(
        self,
        method: str,
        part: str,
        content: bytes | None,
        accept: str,
        most_bytes: int,
        deadline: Deadline,
        content_type: str | None = None,
    ) -> memoryview:
        """The body of a successful answer of the media type ``accept``; see `retrying.ask` for what is tried again.

        ``part`` follows the label set's own path, ``content_type`` is that of ``content``: ``accept`` unless told.
        """
        self._tally.count(requests=1)
        headers = {"Accept": f"{accept}, {problem.MEDIA_TYPE}", "Accept-Encoding": "identity"} | self._authorization
        if content is not None:
            headers["Content-Type"] = content_type or accept
        return ask(
            lambda: self._attempt(method, part, content, headers, most_bytes, deadline),
            url=self.url + part,
            deadline=deadline,
            retries=self._retries,
            on_retry=lambda: self._tally.count(retries=1),
        )

    def _attempt(
        self,
        method: str,
        part: str,
        content: bytes | None,
        headers: dict[str, str],
        most_bytes: int,
        deadline: Deadline,
    ) -> memoryview:
        url = self.url + part
        if not deadline.remaining_s:
            raise DeadlineExceeded(f"{url} was not asked: the {deadline.timeout_s:g} s allowed for the call are over")
        try:
            answer = self._transport.exchange(method, self._path + part, headers, content, most_bytes, deadline)
        except RuntimeError as error:
            if self._closed:
                raise InvalidRequest(f"the connection to {self.url} was closed: connect again") from error
            raise
        except HostUnknown as error:
            raise HostNotFound(f"cannot connect to {self.base_url}: {error}; check how it is written") from error
        except ServerUntrusted as error:
            raise UntrustedServer(
                f"cannot trust {self.base_url}: {error}; nothing was sent. Write the host as its certificate names it, "
                "set SSL_CERT_FILE to the certificate (PEM) of its signer, or write http:// if it speaks no TLS"
            ) from error
        except ConnectFailed as error:
            raise ServerUnreachable(
                f"cannot connect to {self.base_url}: {error}; is `logitcache serve` running there?"
            ) from error
        except AnswerLate as error:
            raise ServerUnreachable(f"{url} did not answer in time; is the server overloaded?") from error
        except ConnectionBroke as error:
            raise ServerUnreachable(
                f"the connection to {self.base_url} broke: {error}; is `logitcache serve` still running there?"
            ) from error
        except AnswerTooLong as error:
            raise MalformedMessage(f"{url} sends {error}") from error
        check_answer(answer, url, headers["Accept"].partition(",")[0])
        return answer.body


def _authorization(key: str | None) -> dict[str, str]:
    """The header that shows a key; none without one."""
    secret = os.environ.get(KEY_VARIABLE, "").strip() if key is None else key
    if not re.fullmatch(r"[!-~]*", secret):
        raise InvalidRequest("a key has neither spaces nor line breaks; what was given is none")  # and is not told
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def _own_transport(base_url: str) -> Transport:
    if not base_url.lower().startswith("https:"):
        return DirectTransport(base_url)
    import httpx  # for its choice of certificates alone

    try:
        trusted = httpx.create_ssl_context()
    except OSError as error:
        raise InvalidRequest(
            f"the certificates to trust cannot be read ({error}): correct SSL_CERT_FILE or SSL_CERT_DIR, or unset it"
        ) from error
    return DirectTransport(base_url, trusted)
