"""The container images that the platform starts from, each pinned by its digest: `make images`.

A tag may get another content, a digest cannot. So that updates arrive all the same, `refresh` asks
the registry for the digest that each tag has now, and writes it into the files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from eurosat.errors import ConfigError, StorageError
from eurosat.runtime import atomic, cli, exit_codes, logs

ROOT = Path(__file__).resolve().parents[1]
FILES = ("docker-compose.yml", "deploy/*/Dockerfile", ".github/workflows/*.yml")
REFERENCE = re.compile(
    r"(?P<name>[a-z0-9][\w./-]*):(?P<tag>[\w][\w.-]*)@(?P<digest>sha256:[0-9a-f]{64})"
)
DEFAULT_REGISTRY = "https://registry-1.docker.io"
"""Docker Hub, where names without a host are."""
MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
TIMEOUT_S = 30


@dataclass(frozen=True, order=True, slots=True)
class Image:
    """A reference such as ``nginx:1.30.5@sha256:…``."""

    name: str
    tag: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}@{self.digest}"


def files(root: Path) -> list[Path]:
    return sorted(file for pattern in FILES for file in root.glob(pattern))


def pinned(file: Path) -> Iterator[Image]:
    """Yield the images that a file pins by a digest."""
    for match in REFERENCE.finditer(file.read_text()):
        yield Image(match["name"], match["tag"], match["digest"])


def current_digest(image: Image, registry: str = DEFAULT_REGISTRY) -> str:
    """Return the digest that the image's tag has in the registry now.

    The protocol is that of the OCI distribution specification, version 1.1; a registry that wants a
    token says where it is given.

    Raises:
        StorageError: the registry cannot be reached, or does not know the tag.
    """
    host, slash, path = image.name.partition("/")
    if slash and "." in host:
        registry = f"https://{host}"
    else:
        path = image.name if "/" in image.name else f"library/{image.name}"
    url = f"{registry}/v2/{path}/manifests/{image.tag}"
    headers = {"Accept": ", ".join(MANIFEST_TYPES)}
    try:
        response = requests.head(url, headers=headers, timeout=TIMEOUT_S)
        if response.status_code == requests.codes.unauthorized:
            token = _token(response.headers.get("WWW-Authenticate", ""))
            headers["Authorization"] = f"Bearer {token}"
            response = requests.head(url, headers=headers, timeout=TIMEOUT_S)
        response.raise_for_status()
        digest = response.headers["Docker-Content-Digest"]
    except (requests.RequestException, KeyError, ValueError) as error:
        raise StorageError(
            f"the registry does not say which digest {image.name}:{image.tag} has "
            f"({type(error).__name__}): check the tag and the network"
        ) from error
    if not REFERENCE.fullmatch(f"{image.name}:{image.tag}@{digest}"):
        raise StorageError(f"the registry gave {image.name}:{image.tag} no sha256 digest")
    return digest


def _token(challenge: str) -> str:
    """Return the token that answers a challenge such as ``Bearer realm="…",service="…"``."""
    parameters = dict(CHALLENGE.findall(challenge))
    response = requests.get(parameters.pop("realm"), params=parameters, timeout=TIMEOUT_S)
    response.raise_for_status()
    return str(response.json()["token"])


def outdated(root: Path, registry: str) -> dict[Image, str]:
    """Return the pinned images whose tag has another digest now, and that digest."""
    images = {image for file in files(root) for image in pinned(file)}
    digests = {image: current_digest(image, registry) for image in sorted(images)}
    return {image: digest for image, digest in digests.items() if digest != image.digest}


def refresh(root: Path, changes: dict[Image, str]) -> None:
    """Write the new digests into the files."""
    for file in files(root):
        text = before = file.read_text()
        for image, digest in changes.items():
            text = text.replace(str(image), f"{image.name}:{image.tag}@{digest}")
        if text != before:
            atomic.atomic_write_text(file, text)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.images", "Compare the pinned container images with the registry.")
    parser.add_argument("command", choices=("check", "refresh"), help="check: exit 1 if outdated")
    parser.add_argument("--registry", default=DEFAULT_REGISTRY, metavar="URL")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if not args.registry.startswith(("https://", "http://127.0.0.1:")):
        raise ConfigError(f"--registry {args.registry} is not https: name one that is")
    changes = outdated(ROOT, args.registry)
    for image, digest in changes.items():
        print(f"{image.name}:{image.tag} is {digest} now")
    if args.command == "refresh":
        refresh(ROOT, changes)
    print(f"{len(changes)} images {'refreshed' if args.command == 'refresh' else 'are outdated'}")
    return exit_codes.NEGATIVE if changes and args.command == "check" else exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
