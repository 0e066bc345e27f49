"""Ranks and sizes of the processes that train one network together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedContext:
    rank: int = 0
    world_size: int = 1
    """Number of processes on all machines."""
    local_world_size: int = 1
    """Number of processes on this machine, this one included."""
    owns_process_group: bool = True
    """Whether this package created the process group; otherwise Ray did."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, *, owns_process_group: bool) -> "DistributedContext":
        """Read RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, which torch's launchers and Ray set."""
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            owns_process_group=owns_process_group,
        )


SINGLE_PROCESS = DistributedContext()


def launcher_environment(rank: int, world: int, port: int) -> Mapping[str, str]:
    """Return the variables that torch's launcher sets for one of ``world`` processes here."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
