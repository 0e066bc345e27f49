"""One ``.tar`` that is whole or refused: members, a manifest of them, a seal over every byte.

Any tar program lists and unpacks it. ``manifest.json``, its last member but one, has the size and
the sha256 of each member before; ``seal``, the last, the sha256 of every byte of the archive before
it, headers and padding too. It tells chance and carelessness, not a forger, who would seal anew.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any, Protocol, cast

from eurosat.errors import DataError
from eurosat.runtime import progress

FORM = "eurosat-backup/1"
MANIFEST, SEAL = "manifest.json", "seal"
DATABASES, ARTIFACTS = "databases/", "artifacts/"
MAX_NAME = 1024
"""Bytes, which is what an object of Google Cloud Storage may be named with."""
BLOCK = tarfile.BLOCKSIZE
TAIL = 4 * BLOCK
"""Bytes of the seal: its header, its text, and the two empty blocks that end a tar."""
CHUNK = 1 << 20


class ArchiveError(DataError):
    """An archive is cut short, altered, or not one of ours."""


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    name: str
    size: int
    """Bytes."""
    sha256: str
    generation: str | None = None
    """Of the object in its bucket that the bytes are from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    members: tuple[Member, ...]
    told: Mapping[str, Any]
    """What the writer wanted known: versions, rows, when and where from."""
    seal: str

    def below(self, folder: str) -> list[Member]:
        return [member for member in self.members if member.name.startswith(folder)]


def dump_of(kind: str) -> str:
    """The member that a database of MLflow's is in."""
    return f"{DATABASES}{kind}.dump"


def stamp() -> str:
    """Now, as names of files may have it."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def is_safe(name: str) -> bool:
    """Whether it stays below the folder that it is unpacked in, whoever unpacks it."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return length <= MAX_NAME and "\0" not in name and not {"", ".", ".."} & {*parts}


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _tail(seal: str) -> bytes:
    return _header(SEAL, len(seal)) + seal.encode().ljust(BLOCK, b"\0") + bytes(2 * BLOCK)


class Writer:
    """Appends members to ``out``; the archive is one only after `finish`."""

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._seal = hashlib.sha256()
        self._members: list[Member] = []

    def add(self, name: str, content: IO[bytes], size: int, generation: str | None = None) -> None:
        """Copy ``size`` bytes from where ``content`` stands.

        Raises:
            ArchiveError: the name could not be unpacked, or ``content`` has another size.
        """
        if not is_safe(name):
            raise ArchiveError(f"{name!r} cannot be unpacked safely: rename it, or remove it")
        self._write(_header(name, size))
        told, left = hashlib.sha256(), size
        while chunk := content.read(min(CHUNK, left)):
            told.update(chunk)
            self._write(chunk)
            left -= len(chunk)
        if left or content.read(1):
            raise ArchiveError(f"{name} has not the {size} bytes that it was told to have")
        self._write(bytes(-size % BLOCK))
        digest = told.hexdigest()
        self._members.append(Member(name=name, size=size, sha256=digest, generation=generation))

    def finish(self, told: Mapping[str, Any]) -> Manifest:
        """Write manifest and seal."""
        manifest = Manifest(members=tuple(self._members), told=told, seal="")
        members = [
            {key: value for key, value in asdict(member).items() if value is not None}
            for member in manifest.members
        ]
        text = json.dumps({"form": FORM, **told, "members": members}, indent=1).encode()
        self._write(_header(MANIFEST, len(text)) + text + bytes(-len(text) % BLOCK))
        seal = self._seal.hexdigest()
        self._out.write(_tail(seal))
        return Manifest(members=manifest.members, told=told, seal=seal)

    def _write(self, data: bytes) -> None:
        self._seal.update(data)
        self._out.write(data)


class _Sealed:
    """The bytes before the seal, hashed as they are read."""

    def __init__(self, stream: IO[bytes], length: int, advance: Callable[[float], None]) -> None:
        self._stream, self._left, self._advance = stream, length, advance
        self.hash = hashlib.sha256()

    def read(self, size: int = CHUNK) -> bytes:
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        self.hash.update(data)
        self._advance(len(data) / 2**20)
        return data


def read(stream: IO[bytes], length: int, label: str) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each member, to be read before the next is asked for.

    Raises:
        ArchiveError: while it is read, at the latest after the last member: what was yielded
            before counts for nothing.
    """
    stream.seek(max(0, length - TAIL))
    end = stream.read(TAIL)
    seal = end[BLOCK : BLOCK + 64].decode("ascii", "replace")
    if len(end) < TAIL or end != _tail(seal):
        raise ArchiveError("the archive is cut short or altered: it does not end with its seal")
    stream.seek(0)
    with progress.counter(max(1, length >> 20), label, "MiB") as advance:
        sealed = _Sealed(stream, length - TAIL, advance)
        try:
            yield from _members(sealed)
        except ArchiveError:
            raise
        except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
            raise ArchiveError(f"the archive is cut short or altered: {error}") from error
        while sealed.read():
            pass
    if sealed.hash.hexdigest() != seal:
        raise ArchiveError("the archive is altered: its bytes have another sha256 than its seal")


def _members(sealed: _Sealed) -> Iterator[tuple[str, int, IO[bytes]]]:
    with tarfile.open(fileobj=cast("IO[bytes]", sealed), mode="r|", bufsize=CHUNK) as tar:
        for info in tar:
            if info.type != tarfile.REGTYPE or info.issparse() or not is_safe(info.name):
                raise ArchiveError(
                    f"the archive holds {info.name!r}, which is no file below a folder: "
                    "it is none of ours"
                )
            content = tar.extractfile(info)
            assert content is not None  # a regular file
            yield info.name, info.size, content
            tar.members.clear()  # type: ignore[attr-defined] # it would remember each


def verify(stream: IO[bytes], length: int) -> Manifest:
    """Read all of it, without keeping anything.

    Raises:
        ArchiveError: a byte is missing or altered, or a member is not as the manifest has it.
    """
    seen: list[tuple[str, int, str]] = []
    text = b""
    for name, size, content in read(stream, length, "verifying"):
        if name == MANIFEST:
            text = content.read()
        told = hashlib.sha256()
        while chunk := content.read(CHUNK):
            told.update(chunk)
        seen.append((name, size, told.hexdigest()))
    if not seen or seen.pop()[0] != MANIFEST:
        raise ArchiveError(f"the archive does not end with {MANIFEST}")
    stream.seek(length - TAIL + BLOCK)
    manifest = _parse(text, stream.read(64).decode())
    listed = [(member.name, member.size, member.sha256) for member in manifest.members]
    if listed != seen:
        raise ArchiveError(f"the archive's members are not those of its {MANIFEST}")
    if len({name for name, _, _ in listed}) < len(listed):
        raise ArchiveError("the archive holds a member twice")
    if any(not name.startswith((DATABASES, ARTIFACTS)) for name, _, _ in listed):
        raise ArchiveError("the archive holds more than databases and artifacts: none of ours")
    return manifest


def _parse(text: bytes, seal: str) -> Manifest:
    try:
        told = json.loads(text)
        if (form := told.pop("form")) != FORM:
            raise ArchiveError(f"the archive is of the form {form!r}, and {FORM} is read here")
        members = tuple(Member(**member) for member in told.pop("members"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"the archive's {MANIFEST} cannot be read: {error}") from error
    return Manifest(members=members, told=told, seal=seal)


def copy(content: IO[bytes], member: Member, into: Sink) -> None:
    """Unpack ``content``.

    Raises:
        ArchiveError: it is not what the manifest says of ``member``.
    """
    told = hashlib.sha256()
    while chunk := content.read(CHUNK):
        told.update(chunk)
        into.write(chunk)
    if told.hexdigest() != member.sha256:
        raise ArchiveError(f"{member.name} has changed since the archive was verified")
