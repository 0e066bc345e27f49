"""Decide which requests are let in: by API key, by free room, and by a loaded version."""

from starlette.requests import Request

from serving.errors import RequestRejected
from serving.hot_swap import AliasWatcher, LoadedVersion
from serving.keys import KeyRing
from serving.limits import ByteBudget, Limits


class Admission:
    """Counts the requests of this process, and rejects those that it has no room for."""

    def __init__(self, watcher: AliasWatcher, limits: Limits, keys: KeyRing | None) -> None:
        self.watcher, self.limits, self._keys = watcher, limits, keys
        self.bytes = ByteBudget(int(limits.bodies_mb * 1e6))
        """Bodies and answers in memory."""
        self.in_flight = 0
        """Requests that are being read or answered."""
        self.unanswered = 0
        """Requests for tiles that have arrived completely and have no answer yet; counted by
        `serving.protocol`.
        """

    def check_key(self, request: Request) -> None:
        """Raise RequestRejected without a valid key, or if the key exceeds its rate."""
        if self._keys is not None:
            self._keys.admit(request.headers)

    def current_version(self) -> LoadedVersion:
        """Return the version that answers.

        Raises:
            RequestRejected: no version is loaded (503).
        """
        if self.watcher.current is None:
            raise RequestRejected(503, f"no version of {self.watcher.reference} is loaded yet")
        return self.watcher.current

    def admit(self) -> LoadedVersion:
        """Return the version that answers, if there is room for one more request.

        Raises:
            RequestRejected: no version is loaded (503), or too many tiles or requests wait (429).
        """
        version = self.current_version()
        too_many_requests = self.in_flight > self.limits.requests
        if too_many_requests or len(version.waiting) >= self.limits.queue + self.limits.uneven:
            raise RequestRejected(429, self._overload_message())
        return version

    def overload_reason(self) -> str:
        """Return why a request for tiles is rejected before it is read; empty: it is read.

        Requests that have arrived count too, as their tiles will reach the queue. Those of slow
        clients do not.
        """
        version = self.watcher.current
        if version is None:
            return ""
        full = version.is_full(self.limits, self.unanswered)
        return self._overload_message() if full else ""

    def _overload_message(self) -> str:
        return f"{self.num_waiting()} tiles wait and {self.in_flight} requests are open: try again"

    def num_waiting(self) -> int:
        """Return how many tiles wait for their batch."""
        return len(self.watcher.current.waiting) if self.watcher.current else 0
