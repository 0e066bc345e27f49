"""How much a server takes on, and reading no more of a request than that."""

import asyncio
import math
import time
from dataclasses import dataclass, replace

from starlette.requests import Request

from eurosat.errors import ConfigError
from serving.errors import Refused

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that the client waits for an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    body_mb: float = 16.0
    """Of one request, in 10^6 bytes."""
    tiles: int = 256
    """In one request."""
    queue: int = 128
    """Tiles that wait; a request that comes then is refused."""
    requests: int = 512
    """That are read or answered at the same time."""
    deadline_s: float = 10.0
    """For an answer to be begun; a client may ask for less by `TIMEOUT_HEADER`."""
    head_s: float = 10.0
    """For a request line and its headers to arrive whole."""
    body_s: float = 10.0
    """For a body to arrive whole."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")

    def shared(self, processes: int) -> "Limits":
        """What each of so many processes takes on."""
        part = {"queue": self.queue, "requests": self.requests}
        return replace(self, **{name: max(1, value // processes) for name, value in part.items()})

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * 1e6)


def deadline(request: Request, limits: Limits) -> float:
    """On the monotonic clock, in seconds.

    Raises:
        Refused: the header is no number of seconds.
    """
    said = request.headers.get(TIMEOUT_HEADER)
    seconds = limits.deadline_s
    if said is not None:
        try:
            seconds = min(float(said), seconds)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise Refused(422, f"the header {TIMEOUT_HEADER} takes seconds above 0, such as 2.5")
    return time.monotonic() + seconds


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body.

    Raises:
        Refused: it is larger than is taken, or does not come in time.
    """
    said = request.headers.get("content-length", "0")
    if not said.isdecimal() or int(said) > limits.body_bytes:
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError as error:
        raise Refused(
            408, f"the body did not arrive within {limits.body_s:g} s: send it without a pause"
        ) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limits: Limits) -> Refused:
    return Refused(
        413, f"a body over {limits.body_mb:g} MB, the most that one request may bring: send less"
    )


class Bucket:
    """Lets ``per_s`` pass each second, and as many at once (a token bucket)."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left, self._at = max(per_s, 1.0), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        full = max(self._per_s, 1.0)
        self._left = min(full, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
