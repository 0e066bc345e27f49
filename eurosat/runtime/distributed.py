"""The place of a process among those that train one network together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedContext:
    rank: int = 0
    world_size: int = 1
    """Processes in all."""
    local_world_size: int = 1
    """Processes on this machine, this one among them."""
    owns_process_group: bool = True
    """Whether the process group was made by this package, not by Ray."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, *, owns_process_group: bool) -> "DistributedContext":
        """As torch's launchers and Ray tell it: RANK, WORLD_SIZE, LOCAL_WORLD_SIZE."""
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            owns_process_group=owns_process_group,
        )


SINGLE_PROCESS = DistributedContext()


def launcher_environment(rank: int, world: int, port: int) -> Mapping[str, str]:
    """What torch's launcher would set for a process of ``world`` on one machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
