"""HTTP as uvicorn reads it, with bounds on a request's head and our shape for what is no HTTP.

Tiles that come while the server is crowded are refused here, before the app is asked.
"""

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving import errors

if TYPE_CHECKING:
    from serving.app import App

MAX_HEAD_BYTES = 32_768
"""Of a request line and its headers together, and of its trailers."""
QUEUED_PATHS = ("/predict", "/predict/batch")
"""Whose tiles go to the queue at once, and which are refused while it is full."""
FRAMING = 1 / 8
"""Of a body, that its chunks and trailers may have beside `MAX_HEAD_BYTES`."""
TOO_LONG = f"a request line and headers over {MAX_HEAD_BYTES} bytes: send less"


class TooLong(ValueError):
    """A head is past the bound; raised in the parser, which ends by ``send_400_response``."""


class Protocol(HttpToolsProtocol):
    _in_head, _begun, _in_body, _too_long = False, False, False, False
    _head_bytes = _field_bytes = 0
    """Of a head as it came since the read in which it began, and of its lines as they are parsed:
    a head that comes at one go has only the latter.
    """
    _body_bytes = _framing_bytes = 0
    """Since the read after a head's end: of the body, and of chunks and trailers around it."""
    _late: asyncio.TimerHandle | None = None
    _arrived = False
    """A request for tiles of this connection has arrived and has no answer: `App.arrived`."""
    _crowded = ""
    """Why the request that is being read is refused, if it is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._app: App = self.config.app  # type: ignore[assignment]
        self._limits = self._app.limits
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        self._answered()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._begun, in_body, before = False, self._in_body, self._body_bytes
        super().data_received(data)
        if self.transport.is_closing():
            return
        if in_body and self._in_body:
            self._framing_bytes += len(data) - (self._body_bytes - before)
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING * self._body_bytes:
                self._end(400, "chunks of a few bytes, or trailers: send larger ones, or none")
        elif self._in_head and not self._begun:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(431, TOO_LONG)
        elif self.timeout_keep_alive_task is None and self._is_idle():
            self._await_head()  # line ends between two requests are none yet

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun, self._field_bytes = True, 0
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_over()
        if len(self.url) + self._field_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        self._body_bytes = self._framing_bytes = 0
        tiles = self.parser.get_method() == b"POST" and self._path() in QUEUED_PATHS
        if tiles and not self._busy() and not self.expect_100_continue:
            said = dict(self.headers).get(b"content-length", b"0")
            if said.isdigit() and int(said) <= self._limits.body_bytes:
                self._crowded = self._app.crowded()
        if self._crowded:
            self._late = self.loop.call_later(self._limits.body_s, self._too_late)
        else:
            if tiles:
                self.scope["extensions"] = {"answered": {"tell": self._answered}}
            super().on_headers_complete()
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._crowded:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._crowded:
            self._refuse()
            return
        if self._busy() and not self._arrived and "extensions" in self.cycle.scope:
            self._arrived = True
            self._app.arrived += 1
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # it was refused early
            self.cycle.more_body = False
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _path(self) -> str:
        return self.url.partition(b"?")[0].decode("latin-1")

    def _busy(self) -> bool:
        """With a request of this connection that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _is_idle(self) -> bool:
        between = self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)
        return between and not self._crowded

    def _answered(self) -> None:
        if self._arrived:
            self._arrived = False
            self._app.arrived -= 1

    def _refuse(self) -> None:
        """And keep the connection."""
        self._head_is_over()
        told, self._crowded = self._crowded, ""
        self._app.metrics.refused_unread(self._path())
        keeps = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self.transport.write(_said(429, told, closes=not keeps))
        if not keeps:
            self.transport.close()
        super().on_response_complete()

    def _refuse_head(self) -> None:
        self._too_long = True
        raise TooLong

    def send_400_response(self, msg: str) -> None:
        if self._too_long:
            self._end(431, TOO_LONG)
        else:
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
        if self._crowded:
            self._end(429, self._crowded)
            return
        waited = f"{self._limits.head_s:g} s"
        self._end(408, f"the request did not arrive within {waited}: send it without a pause")

    def on_response_complete(self) -> None:
        self._answered()
        super().on_response_complete()
        if self.cycle.more_body:  # refused before its body was read, which may never end
            self.loop.call_later(self._limits.body_s, self._no_more, self.cycle)

    def _no_more(self, cycle: RequestResponseCycle) -> None:
        if cycle.more_body and cycle.response_complete:
            self.transport.close()

    def _end(self, status: int, message: str) -> None:
        """Say so as the last answer of this connection."""
        self._head_is_over()
        if self._in_body and not self._crowded and not self.pipeline:  # of the request itself
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        elif self._busy():  # with another: its answer comes first, and then none can
            self.transport.pause_reading()
            self.cycle.keep_alive = False
            return
        self.transport.write(_said(status, message, closes=True))
        self.transport.close()


def _said(status: int, message: str, *, closes: bool) -> bytes:
    body = errors.body(status, message)
    lines = [f"HTTP/1.1 {status} {errors.CODES[status]}", "content-type: application/json"]
    lines += [f"content-length: {len(body)}"]
    lines += [f"retry-after: {errors.RETRY_AFTER_S}"] if status in errors.AGAIN else []
    lines += ["connection: close"] if closes else []
    return "\r\n".join([*lines, "", ""]).encode() + body
