"""The digests of container images: pinned everywhere, and renewed from a registry."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from deploy import images
from eurosat.errors import StorageError
from eurosat.runtime import exit_codes
from tests.support.http_server import listening
from tests.support.paths import ROOT
from tests.support.registry import exit_code

OLD, NEW = (f"sha256:{digit * 64}" for digit in "01")
SCOPE = "repository:{}:pull"


class Registry(BaseHTTPRequestHandler):
    """Speaks the distribution protocol: every pull wants a token for its repository."""

    digests: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        assert query["service"] == ["registry"]
        self._send(200, {}, f'{{"token": "for {query["scope"][0]}"}}'.encode())

    def do_HEAD(self) -> None:
        repository, _, tag = self.path.removeprefix("/v2/").partition("/manifests/")
        scope = SCOPE.format(repository)
        if self.headers["Authorization"] != f"Bearer for {scope}":
            realm = f"http://127.0.0.1:{self.connection.getsockname()[1]}/token"
            challenge = f'Bearer realm="{realm}",service="registry",scope="{scope}"'
            self._send(401, {"WWW-Authenticate": challenge})
            return
        assert "oci.image.index" in self.headers["Accept"], "of all architectures"
        digest = self.digests.get(f"{repository}:{tag}")
        self._send(200 if digest else 404, {"Docker-Content-Digest": digest} if digest else {})

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Registry, "digests", {})
    with listening(Registry) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a compose file and a Dockerfile."""
    (tmp_path / "deploy/web").mkdir(parents=True)
    compose = f"image: nginx:1.30.5@{OLD}\nimage: prom/prometheus:v3@{OLD}\nimage: ours:1\n"
    (tmp_path / "docker-compose.yml").write_text(compose)
    (tmp_path / "deploy/web/Dockerfile").write_text(f"FROM nginx:1.30.5@{OLD}\n")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    return tmp_path


def test_a_digest_that_changed_is_written_into_every_file(
    folder: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Registry.digests |= {"library/nginx:1.30.5": NEW, "prom/prometheus:v3": OLD}
    flag = f"--registry={registry}"
    assert exit_code(images.main, "check", flag) == exit_codes.NEGATIVE
    assert f"nginx:1.30.5 is {NEW} now" in capsys.readouterr().out
    assert OLD in (folder / "deploy/web/Dockerfile").read_text(), "it was only checked"
    assert exit_code(images.main, "refresh", flag) == exit_codes.OK
    compose = (folder / "docker-compose.yml").read_text().splitlines()
    assert compose == [
        f"image: nginx:1.30.5@{NEW}",
        f"image: prom/prometheus:v3@{OLD}",
        "image: ours:1",
    ]
    assert (folder / "deploy/web/Dockerfile").read_text() == f"FROM nginx:1.30.5@{NEW}\n"
    assert exit_code(images.main, "check", flag) == exit_codes.OK


def test_a_tag_that_the_registry_does_not_have_changes_nothing(
    folder: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Registry.digests |= {"library/nginx:1.30.5": NEW}
    before = (folder / "docker-compose.yml").read_text()
    assert exit_code(images.main, "refresh", f"--registry={registry}") == exit_codes.BAD_INPUT
    assert "which digest prom/prometheus:v3 has" in capsys.readouterr().err
    assert (folder / "docker-compose.yml").read_text() == before


def test_a_registry_that_cannot_be_reached_is_named_in_one_line(folder: Path) -> None:
    image = images.Image("nginx", "1.30.5", OLD)
    with pytest.raises(StorageError, match="check the tag and the network"):
        images.current_digest(image, "http://127.0.0.1:9")


def test_every_image_in_the_repository_is_pinned_by_a_digest() -> None:
    found = {image.name for file in images.files(ROOT) for image in images.pinned(file)}
    assert found == {
        "python",
        "postgres",
        "fsouza/fake-gcs-server",
        "prom/prometheus",
        "prom/alertmanager",
        "nginx",
        "grafana/grafana",
        "aquasec/trivy",
    }
