"""Clients that count the answers of a server under load."""

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

CONNECTIONS = 16
PAUSE_S = 0.05
"""Pause after a rejected request, shorter than its Retry-After."""


@dataclass
class LoadResult:
    """Answers to all connections of a client."""

    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    """Model versions of the answers with status 200."""
    accepted_ms: list[float] = field(default_factory=list)
    """Times to the answers with status 200."""

    def p99_ms(self) -> float:
        return statistics.quantiles(self.accepted_ms, n=100)[98]


async def _client(port: int, tile: bytes, result: LoadResult, until: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\n"
    request = f"{head}content-length: {len(tile)}\r\n\r\n".encode() + tile
    try:
        while time.monotonic() < until:
            started = time.monotonic()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].split()[0])
            answer = json.loads(await reader.readexactly(length))
            status = int(head.split()[1])
            result.statuses[status] += 1
            if status == 200:
                result.accepted_ms.append(1000 * (time.monotonic() - started))
                result.versions[answer["model_version"]] += 1
            else:
                await asyncio.sleep(PAUSE_S)
    finally:
        writer.close()


def run_clients(
    port: int, tile: bytes, seconds: float, connections: int = CONNECTIONS
) -> LoadResult:
    """Send the tile again and again over several connections, for some seconds."""
    result = LoadResult()

    async def run_all() -> None:
        until = time.monotonic() + seconds
        clients = (_client(port, tile, result, until) for _ in range(connections))
        await asyncio.gather(*clients)

    asyncio.run(run_all())
    return result
