"""Refuse every connection and look-up that would leave the machine, and record it.

Python imports a module of this name at its start if the folder is on PYTHONPATH. So it also guards
the processes that the tests start, such as servers and workers.
"""

import ipaddress
import os
import socket
from typing import Any

RECORD = "EUROSAT_REFUSED_SOCKETS"
"""Environment variable: the file that gets one line per refusal."""

METADATA = ("169.254.169.254", "metadata.google.internal")
"""Ray always asks which cloud its host belongs to. This is refused, but not recorded."""


def is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or is_own(name)


def is_own(name: str) -> bool:
    """Return whether the address is one of this machine's: only those can be bound."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((name, 0))
        except OSError:
            return False
    return True


def refuse(host: object) -> None:
    if not is_local(host):
        if (file := os.environ.get(RECORD)) and str(host) not in METADATA:
            with open(file, "a", encoding="utf-8") as record:  # noqa: PTH123 - imports little
                record.write(f"{host}\n")
        raise OSError(f"the tests refuse a connection to {host}: it would leave the machine")


def install() -> None:
    connect, connect_ex, look_up = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        connect(self, address)

    def guarded_ex(self: socket.socket, address: Any) -> int:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        return connect_ex(self, address)

    def guarded_look_up(host: Any, *rest: Any, **named: Any) -> Any:
        refuse(host)
        return look_up(host, *rest, **named)

    socket.socket.connect = guarded  # type: ignore[method-assign,assignment]
    socket.socket.connect_ex = guarded_ex  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = guarded_look_up


install()
