"""uvicorn's HTTP protocol, with limits on a request's head and our JSON shape for its errors.

While the server is overloaded, requests for tiles are rejected here, before the app runs.

It uses attributes of uvicorn's `HttpToolsProtocol` and `RequestResponseCycle` that uvicorn does not
document (``cycle``, ``flow``, ``pipeline``, ``timeout_keep_alive_task``, ``response_complete``, …).
So pyproject.toml limits uvicorn's version, and tests/serving/test_bad_input.py checks a newer one.
"""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving import errors

if TYPE_CHECKING:
    from serving.app import App

MAX_HEAD_BYTES = 32_768
"""Size of a request line and its headers together, and of trailers."""
QUEUED_PATHS = ("/predict", "/predict/batch")
"""Paths whose tiles go to the queue; they are rejected while it is full."""
MAX_PIPELINED = 64
"""Requests that may arrive before the first of them is answered. uvicorn keeps them in memory, and
reads on after each answer."""
FRAMING_SHARE = 1 / 8
"""Share of a body that its chunk framing may add to `MAX_HEAD_BYTES`."""
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")
TOO_MANY_PIPELINED = f"over {MAX_PIPELINED} requests at once on a connection: await the answers"
HEAD_TOO_LARGE = f"a request line and headers over {MAX_HEAD_BYTES} bytes: send fewer headers"


class HeadersTooLarge(ValueError):
    """Stops the parser in the middle of a head; uvicorn then calls ``send_400_response``."""


class TooManyPipelined(ValueError):
    """Stops the parser before a request; uvicorn then calls ``send_400_response``."""


class GuardedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head, _message_began, _in_body, _head_too_large = False, False, False, False
    _head_bytes = _field_bytes = 0
    """Size of an incomplete head over several reads, and of its parsed fields; a head that arrives
    in one read has only the latter.
    """
    _body_bytes = _framing_bytes = 0
    """Bytes of the body, and of the chunk framing and trailers around it."""
    _timeout: asyncio.TimerHandle | None = None
    _is_counted = False
    """Whether this connection's request is counted in `Admission.unanswered`."""
    _slow_reader: asyncio.TimerHandle | None = None
    """Ends the connection if the client does not take its answer."""
    _upgrades = False
    """Whether the head that was read asks for another protocol; it is then read again without."""
    _overload = ""
    """Why the request that is being read will be rejected; empty: it will not."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._app: App = self.config.app  # type: ignore[assignment]
        self._limits, self._admission = self._app.limits, self._app.admission
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._on_answered()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_for_reader()

    def _wait_for_reader(self) -> None:
        """Give the client `Limits.answer_s` to take what was sent, if it has not taken it yet."""
        if self._slow_reader is None and self.transport.get_write_buffer_size():
            self._slow_reader = self.loop.call_later(self._limits.answer_s, self._end_slow_reader)

    def _stop_waiting_for_reader(self) -> None:
        if self._slow_reader is not None:
            self._slow_reader.cancel()
            self._slow_reader = None

    def _end_slow_reader(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._message_began, in_body, body_bytes = False, self._in_body, self._body_bytes
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.transport.is_closing():
            return
        if in_body and self._in_body:
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
            if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_SHARE * self._body_bytes:
                self._abort(400, "too many small chunks, or trailers: send larger chunks")
        elif self._in_head and not self._message_began:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._abort(431, HEAD_TOO_LARGE)
        elif self.timeout_keep_alive_task is None and self._is_idle():
            self._await_head()  # it was line ends between two requests, which begin no message

    def _parse(self, data: bytes) -> None:
        """Parse what was received; an upgrade to another protocol is ignored (RFC 9110, 7.8).

        The parser would take such a request as one without a body, and its body as the next
        request. So another parser reads the head without the upgrade, and then what follows.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._upgrades:  # CONNECT, which the app rejects
                    return
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser, self._upgrades = httptools.HttpRequestParser(self), False
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in _without_upgrade(self.headers)]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise TooManyPipelined
        super().on_message_begin()
        if not self.flow.write_paused:  # who sends the next request has the last answer
            self._stop_waiting_for_reader()
        self._message_began, self._field_bytes = True, 0
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > MAX_HEAD_BYTES:
            self._reject_head()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._upgrades = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._upgrades:
            return
        self._end_head()
        if len(self.url) + self._field_bytes > MAX_HEAD_BYTES:
            self._reject_head()
        self._body_bytes = self._framing_bytes = 0
        has_tiles = self.parser.get_method() == b"POST" and self._path() in QUEUED_PATHS
        if has_tiles and not self._is_busy() and not self.expect_100_continue:
            length = dict(self.headers).get(b"content-length", b"0")
            if length.isdigit() and int(length) <= self._limits.body_bytes:
                self._overload = self._admission.overload_reason()
        if self._overload:
            self._timeout = self.loop.call_later(self._limits.body_s, self._on_timeout)
        else:
            if has_tiles:
                self.scope["extensions"] = {"eurosat": {"on_answered": self._on_answered}}
            super().on_headers_complete()
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._overload:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            return
        self._in_body = False
        if self._overload:
            self._reject_unread()
            return
        if self._is_busy() and not self._is_counted and "extensions" in self.cycle.scope:
            self._is_counted = True
            self._admission.unanswered += 1
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # answered before its body
            self.cycle.more_body = False
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _path(self) -> str:
        return self.url.partition(b"?")[0].decode("latin-1")

    def _is_busy(self) -> bool:
        """Return whether a request of this connection is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _is_idle(self) -> bool:
        """Return whether the connection is between two requests."""
        between = self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)
        return between and not self._overload

    def _on_answered(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._admission.unanswered -= 1

    def _reject_unread(self) -> None:
        """Answer 429 without running the app, and keep the connection."""
        self._end_head()
        message, self._overload = self._overload, ""
        self._app.metrics.record_unread_rejection(self._path())
        keep = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self.transport.write(_raw_response(429, message, close=not keep))
        if not keep:
            self.transport.close()
        self._wait_for_reader()
        super().on_response_complete()

    def _reject_head(self) -> None:
        self._head_too_large = True
        raise HeadersTooLarge

    def send_400_response(self, msg: str) -> None:
        if self._head_too_large:
            self._abort(431, HEAD_TOO_LARGE)
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._abort(429, TOO_MANY_PIPELINED)
        else:
            self._abort(400, "the request is not valid HTTP/1.1")

    def _await_head(self) -> None:
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0
            self._timeout = self.loop.call_later(self._limits.head_s, self._on_timeout)

    def _end_head(self) -> None:
        self._in_head = False
        if self._timeout is not None:
            self._timeout.cancel()

    def _on_timeout(self) -> None:
        if self._overload:
            self._abort(429, self._overload)
            return
        limit = f"{self._limits.head_s:g} s"
        self._abort(408, f"the request did not arrive within {limit}: send it without a pause")

    def on_response_complete(self) -> None:
        self._on_answered()
        self._wait_for_reader()
        super().on_response_complete()
        if self.cycle.more_body:  # answered before its body was read, which may never end
            self.loop.call_later(self._limits.body_s, self._close_unread, self.cycle)

    def _close_unread(self, cycle: RequestResponseCycle) -> None:
        if cycle.more_body and cycle.response_complete:
            self.transport.close()

    def _abort(self, status: int, message: str) -> None:
        """Answer with an error, and close the connection."""
        self._end_head()
        if self._in_body and not self._overload and not self.pipeline:  # the body is malformed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        elif self._is_busy():  # with an earlier request: its answer must stay the last one
            self.transport.pause_reading()
            self.cycle.keep_alive = False
            return
        self.transport.write(_raw_response(status, message, close=True))
        self.transport.close()
        self._wait_for_reader()


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers without those that ask for another protocol."""
    for name, value in headers:
        if name in UPGRADE_HEADERS:
            continue
        if name == b"connection":
            options = [option.strip() for option in value.split(b",")]
            remaining = [option for option in options if option.lower() not in UPGRADE_HEADERS]
            if not remaining:
                continue
            yield name, b", ".join(remaining)
        else:
            yield name, value


def _raw_response(status: int, message: str, *, close: bool) -> bytes:
    body = errors.body(status, message)
    lines = [f"HTTP/1.1 {status} {errors.CODES[status]}", "content-type: application/json"]
    lines += [f"content-length: {len(body)}"]
    lines += [f"retry-after: {errors.RETRY_AFTER_S}"] if status in errors.RETRYABLE else []
    lines += ["connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode() + body
