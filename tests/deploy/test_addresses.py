"""Ports and public address of a platform stay the same between starts; logs stay small."""

import socket
import sys
from pathlib import Path

import pytest

from deploy import addresses, service, services
from deploy.service import Service
from eurosat.errors import ConfigError
from tests.support.serving import until


def choose(folder: Path, *, free_ports: bool = False, **requested: int) -> addresses.Addresses:
    return addresses.choose(folder, requested, None, free_ports=free_ports)


def test_chosen_ports_are_those_of_every_later_start(tmp_path: Path) -> None:
    assert choose(tmp_path).ports == addresses.PORTS
    first = choose(tmp_path, free_ports=True)
    assert not {*first.ports.values()} & {*addresses.PORTS.values()}
    first.save(tmp_path)
    assert choose(tmp_path, free_ports=True) == first
    assert choose(tmp_path) == first, "also without the flag"
    assert choose(tmp_path, mlflow=5055).ports == {**first.ports, "mlflow": 5055}
    with socket.create_server(("127.0.0.1", first.ports["mlflow"])):
        again = choose(tmp_path, free_ports=True)
    assert again.ports["mlflow"] != first.ports["mlflow"]
    assert again.ports["serving"] == first.ports["serving"]
    (tmp_path / addresses.FILE).write_text("{")
    with pytest.raises(ConfigError, match="remove it"):
        choose(tmp_path)


def test_a_public_address_is_kept_and_mlflow_accepts_it(tmp_path: Path) -> None:
    url = "https://maps.example.org"
    addresses.choose(tmp_path, {}, url, free_ports=False).save(tmp_path)
    assert choose(tmp_path).public_url == url
    assert services._public_flags(url) == [
        "--allowed-hosts=localhost:*,127.0.0.1:*,maps.example.org,maps.example.org:*",
        "--cors-allowed-origins=https://maps.example.org",
    ]
    assert addresses.choose(tmp_path, {}, "", free_ports=False).public_url is None
    with pytest.raises(ConfigError, match="is no URL"):
        addresses.choose(tmp_path, {}, "maps.example.org", free_ports=False)


def test_a_long_log_is_moved_away_and_the_process_goes_on_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_LOG_BYTES", 1000)
    code = "import time\nfor i in range(10**6): print(i, flush=True); time.sleep(0.001)"
    writer = Service(name="writer", command=[sys.executable, "-c", code], healthy=lambda: True)
    log = tmp_path / "writer.log"
    writer.start(tmp_path)
    try:
        until(lambda: log.stat().st_size > 1000, 60, "a log over the limit")
        writer.rotate_log(tmp_path)
        assert (tmp_path / "writer.log.1").read_text().startswith("0\n1\n")
        until(lambda: log.stat().st_size > 0, 60, "lines after the move")
        assert b"\0" not in log.read_bytes(), "it appends to the emptied file"
    finally:
        writer.stop()
