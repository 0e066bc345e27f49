"""API keys: made once, shown once, kept as hashes in a file that the server reads."""

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from serving.errors import Refused
from serving.limits import Bucket

PER_S = 1000.0
BYTES = 32
"""Of a key: it cannot be guessed, so that a plain hash keeps it."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    digest: str
    bucket: Bucket


class Keys:
    """Who may ask, and how often."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, file: Path, share: float = 1.0) -> "Keys":
        """Lines of name, sha256 and requests a second, of which this process admits a ``share``.

        Raises:
            ConfigError: the file cannot be read, or a line is none.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"{file} cannot be read: make it with `python -m serving.keys NAME`"
            ) from error
        keys = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                name, digest, per_s = line.split()
                if not SHA256.fullmatch(digest) or not 0 < float(per_s) < float("inf"):
                    raise ValueError
                keys.append(Key(name, digest, Bucket(float(per_s) * share)))
            except ValueError as error:
                raise ConfigError(
                    f"{file}:{number} is no line of name, sha256 and requests a second: "
                    "make it with `python -m serving.keys NAME`"
                ) from error
        return cls(keys)

    def admit(self, headers: Mapping[str, str]) -> str:
        """The name of the asker.

        Raises:
            Refused: no key that is known, or one that asks too often.
        """
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not given or not found:
            raise Refused(401, "send an API key, as `Authorization: Bearer KEY`")
        if not found[0].bucket.take():
            raise Refused(429, f"the key {found[0].name} asks more often than it may: wait")
        return found[0].name


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def create(file: Path, name: str, per_s: float) -> str:
    """A new key, of which the file keeps the hash; readable by its owner alone.

    Raises:
        ConfigError: the name is taken or unfit, or the file cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"a key's name is 1 to 64 letters, digits, '_', '.' or '-'; got {name!r}")
    if not 0 < per_s < float("inf"):
        raise ConfigError(f"--per-second must be above 0; got {per_s:g}")
    if file.exists() and any(key.name == name for key in Keys.read(file)._keys):
        raise ConfigError(
            f"{file} has a key {name} already: choose another name or remove its line"
        )
    key = secrets.token_urlsafe(BYTES)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as written:
            os.fchmod(handle, 0o600)
            written.write(f"{name} {_digest(key)} {per_s:g}\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    return key


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.keys", "Make an API key, print it once, and keep its hash in a file."
    )
    parser.add_argument("name", help="who it is for")
    parser.add_argument("--file", type=Path, default=Path("keys.txt"))
    parser.add_argument("--per-second", type=float, default=PER_S, help="requests that it may send")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    print(create(args.file, args.name, args.per_second))
    print(f"its hash is in {args.file}; the key itself is kept nowhere", file=sys.stderr)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
