"""Any transport of httpx in the place of ours: for proxies, Unix sockets, or a server that is a function in a test."""

from collections.abc import Mapping

import httpx

from logitcache.client.connecting import AnswerLate, ConnectFailed
from logitcache.client.deadline import Deadline
from logitcache.client.transport import MAX_TEXT_BYTES, Answer, AnswerTooLong, ConnectionBroke


class HttpxTransport:
    """A `logitcache.client.transport.Transport` over one of httpx, which bounds each receive and not their sum."""

    def __init__(self, base_url: str, transport: httpx.BaseTransport) -> None:
        self._base_url, self._transport = base_url, transport

    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | None,
        most_bytes: int,
        deadline: Deadline,
    ) -> Answer:
        """See `Transport.exchange`."""
        timeout = httpx.Timeout(deadline.remaining_s).as_dict()
        request = httpx.Request(
            method, self._base_url + path, headers=dict(headers), content=content, extensions={"timeout": timeout}
        )
        try:
            response = self._transport.handle_request(request)
            try:
                body = bytearray()
                most = most_bytes if response.is_success else MAX_TEXT_BYTES
                for piece in response.stream:  # type: ignore[union-attr]
                    body += piece
                    if len(body) > most:
                        raise AnswerTooLong(f"more than the {most:,} bytes that its answer can have")
                    if not deadline.remaining_s:
                        raise AnswerLate("the time allowed for the call is over")
            finally:
                response.close()
        except httpx.ConnectError as error:
            raise ConnectFailed(str(error)) from error
        except httpx.TimeoutException as error:
            raise AnswerLate(str(error)) from error
        except httpx.TransportError as error:
            raise ConnectionBroke(str(error)) from error
        return Answer(response.status_code, dict(response.headers), memoryview(body))

    def close(self) -> None:
        """Close what it stands for."""
        self._transport.close()
