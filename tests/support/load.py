"""Clients that count what a server answers under load."""

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

SEEN = 16
"""Connections of the client that is asked how it went."""


@dataclass
class Seen:
    """What one client saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    accepted_ms: list[float] = field(default_factory=list)

    def p99_ms(self) -> float:
        return statistics.quantiles(self.accepted_ms, n=100)[98]


async def _client(port: int, tile: bytes, seen: Seen, until: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\n"
    whole = f"{head}content-length: {len(tile)}\r\n\r\n".encode() + tile
    try:
        while time.monotonic() < until:
            started = time.monotonic()
            writer.write(whole)
            said = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(said.partition("content-length: ")[2].split()[0])
            answer = json.loads(await reader.readexactly(length))
            status = int(said.split()[1])
            seen.statuses[status] += 1
            if status == 200:
                seen.accepted_ms.append(1000 * (time.monotonic() - started))
                seen.versions[answer["model_version"]] += 1
            else:
                await asyncio.sleep(
                    0.05
                )  # sooner than it is told to; the crowd does not wait at all
    finally:
        writer.close()


def watched(port: int, tile: bytes, seconds: float, connections: int = SEEN) -> Seen:
    """Ask over so many connections for a while."""
    seen = Seen()

    async def all_of_them() -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(_client(port, tile, seen, until) for _ in range(connections)))

    asyncio.run(all_of_them())
    return seen
