"""HTTP as uvicorn reads it, with bounds on a request's head and our shape for what is no HTTP."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving import refusals
from serving.limits import Limits

MAX_HEAD_BYTES = 32_768
"""Of a request line and its headers together."""


class Protocol(HttpToolsProtocol):
    _in_head, _head_bytes = False, 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limits: Limits = self.config.app.limits  # type: ignore[union-attr]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(431, f"a request line and headers over {MAX_HEAD_BYTES} bytes: send less")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_is_over()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(400, "this is not HTTP/1.1")

    def _await_head(self) -> None:
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0
            self._late = self.loop.call_later(self._limits.head_s, self._too_late)

    def _head_is_over(self) -> None:
        self._in_head = False
        if self._late is not None:
            self._late.cancel()

    def _too_late(self) -> None:
        waited = f"{self._limits.head_s:g} s"
        self._end(408, f"the request did not arrive within {waited}: send it without a pause")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # refused before its body was read, which may never end
            self.loop.call_later(self._limits.body_s, self._no_more, self.cycle)

    def _no_more(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and not self._in_head:
            self.transport.close()

    def _end(self, status: int, message: str) -> None:
        self._head_is_over()
        body = refusals.body(status, message)
        head = f"HTTP/1.1 {status} {refusals.CODES[status]}\r\ncontent-type: application/json\r\n"
        head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
