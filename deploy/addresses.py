"""Ports and public address of the platform without containers, which stay the same between starts.

Everybody's tracking address, and the journals of their runs, name the port.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deploy.service import free_port, is_port_free
from eurosat.errors import ConfigError
from eurosat.runtime import atomic

FILE = "addresses.json"
PORTS = {"mlflow": 5000, "serving": 5001, "promoter": 5002, "store": 4443, "postgres": 5432}


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """How the services of one platform are reached."""

    ports: Mapping[str, int]
    """Port on 127.0.0.1 by service."""
    public_url: str | None = None
    """URL of a reverse proxy before MLflow, such as https://maps.example.org."""

    def save(self, folder: Path) -> None:
        """Store the addresses for the next start."""
        atomic.atomic_write_text(folder / FILE, json.dumps(asdict(self), indent=1))


def choose(
    folder: Path, requested: Mapping[str, int | None], public_url: str | None, *, free_ports: bool
) -> Addresses:
    """Return the requested addresses, or else those of the last start, or else the default ones.

    With ``free_ports`` free ports replace default ones, and ports of the last start that are taken.

    Raises:
        ConfigError: the stored file or ``public_url`` cannot be read.
    """
    stored = _load(folder)
    ports: dict[str, int] = {}
    for name, default in PORTS.items():
        port = requested.get(name) or stored.ports.get(name)
        if port is None:
            port = free_port() if free_ports else default
        elif free_ports and not requested.get(name) and not is_port_free(port):
            port = free_port()
        ports[name] = port
    if public_url is None:
        public_url = stored.public_url
    if public_url and not (urlsplit(public_url).scheme and urlsplit(public_url).hostname):
        raise ConfigError(
            f"--public-url {public_url} is no URL: give one such as https://maps.example.org"
        )
    return Addresses(ports=ports, public_url=public_url or None)


def _load(folder: Path) -> Addresses:
    file = folder / FILE
    try:
        return Addresses(**json.loads(file.read_text()))
    except FileNotFoundError:
        return Addresses(ports={})
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): remove it") from error
