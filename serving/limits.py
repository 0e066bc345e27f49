"""Limits of a server, and the checks that hold a request to them."""

import asyncio
import math
import time
from dataclasses import dataclass, replace

from starlette.requests import Request

from eurosat.errors import ConfigError
from serving.errors import RequestRejected

SPREAD = 4.0
"""Standard deviations of the number of connections that one of several processes gets."""
TIMEOUT_HEADER = "x-request-timeout"
"""Header of a request: how many seconds the client waits for an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a server; each of its processes gets a share: `shared`."""

    body_mb: float = 16.0
    """Size of one request body, in 10^6 bytes."""
    tiles: int = 256
    """Tiles in one request."""
    queue: int = 128
    """Tiles that wait; at this number a new request is rejected."""
    uneven: int = 0
    """Tiles beyond `queue` that may wait in one of several processes, as the kernel does not spread
    connections evenly over them.
    """
    requests: int = 512
    """Requests that are read or answered at the same time."""
    bodies_mb: float = 256.0
    """Size of all bodies and answers in memory, in 10^6 bytes; a body beyond it is rejected."""
    deadline_s: float = 10.0
    """Time until a prediction must begin; a client may ask for less by `TIMEOUT_HEADER`."""
    head_s: float = 10.0
    """Time for a request line and its headers to arrive."""
    body_s: float = 10.0
    """Time for a body to arrive."""
    answer_s: float = 10.0
    """Time for a client to take an answer."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "uneven" and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")

    def shared(self, processes: int) -> "Limits":
        """Return the limits of one of several processes.

        Each connection goes to a random process. So a process takes its share of the requests and
        `SPREAD` standard deviations (of a binomial distribution) more: as many requests as the
        limit are hardly ever rejected because one process has too many of them.
        """

        def share(total: int) -> int:
            return max(1, total // processes)

        def excess(total: int) -> int:
            return math.ceil(SPREAD * math.sqrt(total / processes * (1 - 1 / processes)))

        return replace(
            self,
            queue=share(self.queue),
            uneven=excess(self.queue),
            requests=share(self.requests) + excess(self.requests),
            bodies_mb=max(self.body_mb, self.bodies_mb / processes),
        )

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * 1e6)


class ByteBudget:
    """Counts the bytes of all requests in memory against one limit."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0


class BytesInUse:
    """The share of one request in a `ByteBudget`."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self._size = budget, 0

    def add(self, size: int) -> None:
        """Count bytes that are in memory already."""
        self._size += size
        self._budget.used += size

    def add_body(self, size: int) -> None:
        """Count bytes of a body.

        Raises:
            RequestRejected: they exceed what is left of the budget (429).
        """
        if self._budget.used + size > self._budget.max_bytes:
            megabytes = self._budget.max_bytes / 1e6
            raise RequestRejected(
                429, f"the requests in memory reach the limit of {megabytes:g} MB: try again"
            )
        self.add(size)

    def release(self) -> None:
        """Return everything to the budget."""
        self._budget.used -= self._size
        self._size = 0


def deadline(request: Request, limits: Limits) -> float:
    """Return when a prediction must begin, in seconds on the monotonic clock.

    Raises:
        RequestRejected: `TIMEOUT_HEADER` is not a number of seconds above 0.
    """
    header = request.headers.get(TIMEOUT_HEADER)
    seconds = limits.deadline_s
    if header is not None:
        try:
            seconds = min(float(header), seconds)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            message = f"the header {TIMEOUT_HEADER} takes seconds above 0, such as 2.5"
            raise RequestRejected(422, message)
    return time.monotonic() + seconds


async def read_body(request: Request, limits: Limits, in_use: BytesInUse) -> bytes:
    """Return the complete body, whose bytes are counted as they arrive.

    Raises:
        RequestRejected: the body is too large (413), does not arrive in time (408), or exceeds what
            is left for all requests (429).
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.body_bytes:
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                in_use.add_body(len(chunk))
                chunks.append(chunk)
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.body_s:g} s: send it without a pause"
        raise RequestRejected(408, message) from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limits: Limits) -> RequestRejected:
    message = f"a body over the limit of {limits.body_mb:g} MB: send fewer tiles in one request"
    return RequestRejected(413, message)


class TokenBucket:
    """Lets ``rate_per_s`` requests pass each second, and bursts of one second's requests."""

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s, self._capacity = rate_per_s, max(rate_per_s, 1.0)
        self._tokens, self._refilled_at = self._capacity, time.monotonic()

    def take(self) -> bool:
        """Take a token; return whether there was one."""
        now = time.monotonic()
        refill = (now - self._refilled_at) * self._rate_per_s
        self._tokens = min(self._capacity, self._tokens + refill)
        self._refilled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
