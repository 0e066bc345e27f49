"""API keys: made once, printed once, stored as hashes in a file that the server reads."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from serving.errors import RequestRejected
from serving.limits import TokenBucket

log = logging.getLogger(__name__)

DEFAULT_RATE_PER_S = 1000.0
KEY_BYTES = 32
"""Random bytes of a key: enough to store its plain SHA-256, as nobody can guess it."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
RELOAD_INTERVAL_S = 1.0
"""Time between two looks at the file: a key that is added or removed counts from then on."""
REMEDY = "create it with `python -m serving.keys NAME`"


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str
    digest: str
    """SHA-256 of the key, in hexadecimal."""
    rate_per_s: float
    """Of all processes together."""
    bucket: TokenBucket


class KeyRing:
    """The API keys that a process accepts, each with its own rate."""

    def __init__(self, file: Path, share: float = 1.0) -> None:
        """Read the file; this process allows ``share`` of each rate.

        Raises:
            ConfigError: the file cannot be read, or a line is malformed.
        """
        self._file, self._share = file, share
        self._stamp, self._looked_at = _stamp(file), time.monotonic()
        self._keys = _read_keys(file, share)

    def _reload(self) -> None:
        """Read the file again if it has changed; a faulty one leaves the keys as they are."""
        if time.monotonic() - self._looked_at < RELOAD_INTERVAL_S:
            return
        self._looked_at = time.monotonic()
        if (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = _read_keys(self._file, self._share)
        except ConfigError as error:
            log.warning("the API keys stay as they were: %s", error)
            return
        present = {(key.digest, key.rate_per_s): key.bucket for key in self._keys}
        self._keys = [
            replace(key, bucket=present.get((key.digest, key.rate_per_s), key.bucket))
            for key in keys
        ]
        log.info("read %s again: %d API keys", self._file, len(keys))

    def names(self) -> list[str]:
        return [key.name for key in self._keys]

    def admit(self, headers: Mapping[str, str]) -> str:
        """Return the name of the request's key.

        Raises:
            RequestRejected: the key is missing or unknown (401), or exceeds its rate (429).
        """
        self._reload()
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(sent)
        matching = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not sent or not matching:
            raise RequestRejected(401, "send an API key, as `Authorization: Bearer KEY`")
        key = matching[0]
        if not key.bucket.take():
            message = f"the key {key.name} exceeds its rate: send fewer requests per second"
            raise RequestRejected(429, message)
        return key.name


def _read_keys(file: Path, share: float) -> list[ApiKey]:
    """Read lines of "NAME SHA256 REQUESTS_PER_S".

    Raises:
        ConfigError: the file cannot be read, or a line is malformed.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{file} cannot be read: {REMEDY}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, digest, rate_per_s = line.split()
            if not SHA256_PATTERN.fullmatch(digest) or not 0 < float(rate_per_s) < float("inf"):
                raise ValueError
            keys.append(
                ApiKey(name, digest, float(rate_per_s), TokenBucket(float(rate_per_s) * share))
            )
        except ValueError as error:
            raise ConfigError(
                f"{file}:{number} is not a line of name, sha256 and requests per second: {REMEDY}"
            ) from error
    return keys


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file does; None if it cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def create(file: Path, name: str, rate_per_s: float) -> str:
    """Return a new key, and append its hash to the file, which only its owner may read.

    Raises:
        ConfigError: the name exists or is malformed, or the file cannot be written.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"a key's name is 1 to 64 letters, digits, '_', '.' or '-'; got {name!r}")
    if not 0 < rate_per_s < float("inf"):
        raise ConfigError(f"--per-second must be above 0; got {rate_per_s:g}")
    if file.exists() and name in KeyRing(file).names():
        raise ConfigError(
            f"{file} already has a key {name}: choose another name or remove its line"
        )
    key = secrets.token_urlsafe(KEY_BYTES)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, 0o600)
            stream.write(f"{name} {_digest(key)} {rate_per_s:g}\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    return key


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.keys", "Create an API key, print it once, and store its hash in a file."
    )
    parser.add_argument("name", help="who will use the key")
    parser.add_argument("--file", type=Path, default=Path("keys.txt"))
    parser.add_argument(
        "--per-second", type=float, default=DEFAULT_RATE_PER_S, help="requests that it may send"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    print(create(args.file, args.name, args.per_second))
    print(f"its hash is in {args.file}; the key itself is not stored anywhere", file=sys.stderr)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
