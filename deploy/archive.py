"""A backup archive: a ``.tar`` with a manifest and a seal, which is either complete or refused.

Every tar program lists and unpacks it. The second to last member, ``manifest.json``, has the size
and sha256 of each member before it. The last one, ``seal``, is the HMAC-SHA256 of every byte before
it, headers and padding included, under the platform's own key: an archive that is damaged, or that
somebody else made, is refused. Archives of the first format have a plain sha256 there, which
everybody can compute.
"""

import hashlib
import hmac
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any, Protocol, cast

from eurosat.errors import DataError
from eurosat.runtime import progress

FORMAT, FORMAT_WITHOUT_KEY = "eurosat-backup/2", "eurosat-backup/1"
MANIFEST, SEAL = "manifest.json", "seal"
DATABASES, ARTIFACTS = "databases/", "artifacts/"
MAX_NAME_BYTES = 1024
"""Limit of Google Cloud Storage for the name of an object."""
BLOCK_BYTES = tarfile.BLOCKSIZE
TAIL_BYTES = 4 * BLOCK_BYTES
"""Size of the seal: its header, its text, and the two empty blocks that end a tar."""
CHUNK_BYTES = 1 << 20


class ArchiveError(DataError):
    """An archive is incomplete, damaged, or was not made by this project."""


class Digest(Protocol):
    """A running digest of hashlib or hmac."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Sink(Protocol):
    """Anything that can be written to."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    generation: str | None = None
    """Generation of the object that was copied; None for a database."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents and metadata of an archive, and its seal."""

    members: tuple[Member, ...]
    metadata: Mapping[str, Any]
    """When and from where it was saved, versions, row counts."""
    seal: str

    def below(self, folder: str) -> list[Member]:
        """Return the members in a folder, such as `ARTIFACTS`."""
        return [member for member in self.members if member.name.startswith(folder)]


def dump_name(database: str) -> str:
    """Return the name of the member that holds a database."""
    return f"{DATABASES}{database}.dump"


def _new_seal(key: bytes | None) -> Digest:
    """Return the digest that seals an archive; without a key that of the first format."""
    return hmac.new(key, digestmod=hashlib.sha256) if key else hashlib.sha256()


def timestamp() -> str:
    """Return the present time in UTC, in a form that file names allow."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def is_safe(name: str) -> bool:
    """Return whether every tar program unpacks the name below the target folder."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return length <= MAX_NAME_BYTES and "\0" not in name and not {"", ".", ".."} & {*parts}


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _tail(seal: str) -> bytes:
    return (
        _header(SEAL, len(seal)) + seal.encode().ljust(BLOCK_BYTES, b"\0") + bytes(2 * BLOCK_BYTES)
    )


class Writer:
    """Writes an archive to ``out``, sealed with ``key``. It is valid only after `finish`."""

    def __init__(self, out: Sink, key: bytes) -> None:
        self._out = out
        self._seal = _new_seal(key)
        self._members: list[Member] = []

    def add(self, name: str, content: IO[bytes], size: int, generation: str | None = None) -> None:
        """Add a member of ``size`` bytes from the current position of ``content``.

        Raises:
            ArchiveError: the name cannot be unpacked safely, or ``content`` has another size.
        """
        if not is_safe(name):
            raise ArchiveError(f"{name!r} cannot be unpacked safely: rename or delete it")
        self._write(_header(name, size))
        digest, remaining = hashlib.sha256(), size
        while chunk := content.read(min(CHUNK_BYTES, remaining)):
            digest.update(chunk)
            self._write(chunk)
            remaining -= len(chunk)
        if remaining or content.read(1):
            raise ArchiveError(
                f"{name} has not the announced size of {size} bytes: run the command again"
            )
        self._write(bytes(-size % BLOCK_BYTES))
        member = Member(name=name, size=size, sha256=digest.hexdigest(), generation=generation)
        self._members.append(member)

    def finish(self, metadata: Mapping[str, Any]) -> Manifest:
        """Write the manifest and the seal."""
        manifest = Manifest(members=tuple(self._members), metadata=metadata, seal="")
        members = [
            {key: value for key, value in asdict(member).items() if value is not None}
            for member in manifest.members
        ]
        text = json.dumps({"form": FORMAT, **metadata, "members": members}, indent=1).encode()
        self._write(_header(MANIFEST, len(text)) + text + bytes(-len(text) % BLOCK_BYTES))
        seal = self._seal.hexdigest()
        self._out.write(_tail(seal))
        return Manifest(members=manifest.members, metadata=metadata, seal=seal)

    def _write(self, data: bytes) -> None:
        self._seal.update(data)
        self._out.write(data)


class _SealedReader:
    """Reads the bytes before the seal and adds them to the digest of it."""

    def __init__(
        self, stream: IO[bytes], length: int, advance: Callable[[float], None], digest: Digest
    ) -> None:
        self._stream, self._remaining, self._advance = stream, length, advance
        self._digest = digest

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        data = self._stream.read(min(size, self._remaining))
        self._remaining -= len(data)
        self._digest.update(data)
        self._advance(len(data) / 2**20)
        return data


def read(
    stream: IO[bytes], length: int, label: str, key: bytes | None
) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and content of each member; read the content before the next member.

    Without ``key`` only archives of the first format are accepted.

    Raises:
        ArchiveError: the archive is damaged. It may come as late as after the last member, and
            then every member before it is invalid too.
    """
    stream.seek(max(0, length - TAIL_BYTES))
    end = stream.read(TAIL_BYTES)
    seal = end[BLOCK_BYTES : BLOCK_BYTES + 64].decode("ascii", "replace")
    if len(end) < TAIL_BYTES or end != _tail(seal):
        raise ArchiveError(
            "the archive is incomplete or damaged: it does not end with its seal; use another one"
        )
    stream.seek(0)
    with progress.counter(max(1, length >> 20), label, "MiB") as advance:
        digest = _new_seal(key)
        sealed = _SealedReader(stream, length - TAIL_BYTES, advance, digest)
        try:
            yield from _members(sealed)
        except ArchiveError:
            raise
        except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
            raise ArchiveError(
                f"the archive is incomplete or damaged ({error}): use another one"
            ) from error
        while sealed.read():
            pass
    if not hmac.compare_digest(digest.hexdigest(), seal):
        raise ArchiveError(
            "the archive is damaged, or was sealed with another backup_key: use another archive, "
            "or the key of the platform that saved it; one without a key needs --without-key"
            if key
            else "the archive is damaged, or sealed with a key: leave out --without-key"
        )


def _members(sealed: _SealedReader) -> Iterator[tuple[str, int, IO[bytes]]]:
    with tarfile.open(fileobj=cast("IO[bytes]", sealed), mode="r|", bufsize=CHUNK_BYTES) as tar:
        for info in tar:
            if info.type != tarfile.REGTYPE or info.issparse() or not is_safe(info.name):
                raise ArchiveError(
                    f"the archive holds {info.name!r}, which is no file below a folder: "
                    "it was not made by deploy.backup"
                )
            content = tar.extractfile(info)
            assert content is not None  # a regular file
            yield info.name, info.size, content
            tar.members.clear()  # type: ignore[attr-defined] # else it keeps every header


def verify(stream: IO[bytes], length: int, key: bytes | None) -> Manifest:
    """Read the whole archive and return its manifest; see `read` for ``key``.

    Raises:
        ArchiveError: a byte is missing or damaged, or a member differs from the manifest.
    """
    members: list[tuple[str, int, str]] = []
    text = b""
    for name, size, content in read(stream, length, "verifying", key):
        if name == MANIFEST:
            text = content.read()
        digest = hashlib.sha256()
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
        members.append((name, size, digest.hexdigest()))
    if not members or members.pop()[0] != MANIFEST:
        raise ArchiveError(f"the archive does not end with {MANIFEST}")
    stream.seek(length - TAIL_BYTES + BLOCK_BYTES)
    expected_format = FORMAT if key else FORMAT_WITHOUT_KEY
    manifest = _parse(text, stream.read(64).decode(), expected_format)
    expected = [(member.name, member.size, member.sha256) for member in manifest.members]
    if expected != members:
        raise ArchiveError(f"the archive's members are not those of its {MANIFEST}")
    if len({name for name, _, _ in expected}) < len(expected):
        raise ArchiveError("the archive holds a member twice")
    if any(not name.startswith((DATABASES, ARTIFACTS)) for name, _, _ in expected):
        raise ArchiveError(
            "the archive holds more than databases and artifacts: it was not made by deploy.backup"
        )
    return manifest


def _parse(text: bytes, seal: str, expected_format: str) -> Manifest:
    try:
        metadata = json.loads(text)
        if (version := metadata.pop("form")) != expected_format:
            raise ArchiveError(
                f"the archive has the format {version!r}; {expected_format} is expected"
            )
        members = tuple(Member(**member) for member in metadata.pop("members"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"the archive's {MANIFEST} cannot be read: {error}") from error
    return Manifest(members=members, metadata=metadata, seal=seal)


def copy(content: IO[bytes], member: Member, into: Sink) -> None:
    """Copy the content of a member, and verify it against the manifest.

    Raises:
        ArchiveError: the content has another sha256.
    """
    digest = hashlib.sha256()
    while chunk := content.read(CHUNK_BYTES):
        digest.update(chunk)
        into.write(chunk)
    if digest.hexdigest() != member.sha256:
        raise ArchiveError(
            f"{member.name} has changed since the archive was verified: run the command again"
        )
