"""Save, verify, restore the platform's databases and artifacts as one archive (docs/backup.md)."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deploy import archive, databases, schema, secrets, stored_secrets
from deploy.restore import restore
from deploy.save import save
from deploy.transfer import open_checked
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from eurosat.storage import is_bucket

log = logging.getLogger(__name__)

ARTIFACTS = "EUROSAT_ARTIFACTS"
SECRETS = "EUROSAT_SECRETS"
CREDENTIALS = "EUROSAT_BACKUP_CREDENTIALS"
"""File of the service account for archives in a bucket; MLflow does not have it."""
SEAL_KEY = "backup_key"


def _credentials() -> Path | None:
    """Return the file of `CREDENTIALS`; None if there is none, or if it is still to be filled.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not (name := os.environ.get(CREDENTIALS)):
        return None
    try:
        is_filled = Path(name).read_text().strip() not in ("", "{}")
    except OSError as error:
        raise ConfigError(f"{CREDENTIALS}={name} cannot be read: {error.strerror}") from error
    return Path(name) if is_filled else None


def _seal_key() -> bytes:
    """Return the key of the archives' seals.

    Raises:
        ConfigError: the folder of secrets is not known, or has no key.
    """
    if not (folder := os.environ.get(SECRETS)):
        raise ConfigError(
            f"{SECRETS} is not set: name the folder of `make secrets`, whose {SEAL_KEY} seals "
            "archives"
        )
    return secrets.read(SEAL_KEY, Path(folder)).encode()


@contextmanager
def _open_archive(url: str, setting: str) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the archive as a stream, and its size in bytes."""
    folder, _, key = url.rpartition("/")
    folder = folder or ("/" if url.startswith("/") else ".")
    store = open_checked(folder, setting, _credentials())
    info = store.find(key)
    if info is None:
        raise ConfigError(f"{setting} {url}: there is no such archive")
    with store.open(info) as stream:
        yield stream, info.size


def _summary(manifest: archive.Manifest) -> str:
    """Return the contents of an archive in one line."""
    rows = manifest.metadata["databases"]["mlflow"]["rows"]
    artifacts = manifest.below(archive.ARTIFACTS)
    size = sum(member.size for member in artifacts)
    return (
        f"{rows['runs']} runs, {rows['metrics']} metric points, {rows['model_versions']} model "
        f"versions, {len(artifacts)} artifacts ({size / 1e6:,.1f} MB), "
        f"of {manifest.metadata['created']}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "deploy.backup",
        "Save the platform's databases and artifacts as one archive, verify or restore it. Reads "
        "EUROSAT_DATABASE_URI, EUROSAT_AUTH_DATABASE_URI, PGPASSFILE, EUROSAT_ARTIFACTS, "
        "EUROSAT_SECRETS, EUROSAT_BACKUP_CREDENTIALS and STORAGE_EMULATOR_HOST.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    save_parser = commands.add_parser("save", help="save an archive, also while runs are written")
    save_parser.add_argument("--to", required=True, metavar="DIR|gs://BUCKET/PREFIX")
    verify_parser = commands.add_parser(
        "verify", help="read a whole archive; exit 2 if it is incomplete, damaged or not yours"
    )
    verify_parser.add_argument("file", metavar="FILE|gs://BUCKET/NAME")
    restore_parser = commands.add_parser("restore", help="restore an archive; stop MLflow first")
    restore_parser.add_argument(
        "--from", required=True, dest="file", metavar="FILE|gs://BUCKET/NAME"
    )
    restore_parser.add_argument(
        "--replace", action="store_true", help="replace present data, and keep it under new names"
    )
    for reader in (verify_parser, restore_parser):
        reader.add_argument(
            "--without-key",
            action="store_true",
            help="accept an archive of the first format, which anybody could have made",
        )
    commands.add_parser(
        "use-secrets", help=f"make the databases accept the secrets in {SECRETS}, after a restore"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    logs.setup(args.log_level)
    if args.command == "verify":
        with _open_archive(args.file, "verify") as (stream, size):
            key = None if args.without_key else _seal_key()
            print(f"complete: {_summary(archive.verify(stream, size, key))}")
        return exit_codes.OK
    configured = databases.from_environment(os.environ)
    if args.command == "use-secrets":
        return _use_secrets(configured)
    if not (url := os.environ.get(ARTIFACTS)):
        raise ConfigError(f"{ARTIFACTS} is not set: give gs://bucket/prefix, or a folder")
    artifacts = open_checked(url, ARTIFACTS)
    if args.command == "save":
        credentials = _credentials()
        if is_bucket(args.to) and credentials is None:
            log.warning(
                "%s is written with the account of the artifacts, which MLflow has too: give the "
                "backup an account of its own, %s (docs/backup.md)",
                args.to,
                CREDENTIALS,
            )
        target = open_checked(args.to, "--to", credentials)
        address, manifest = save(configured, artifacts, target, _seal_key())
        log.info("saved %s", _summary(manifest))
        print(address)
        return exit_codes.OK
    with _open_archive(args.file, "--from") as (stream, size):
        key = None if args.without_key else _seal_key()
        manifest, previous = restore(
            stream, size, configured, artifacts, key=key, replace=args.replace
        )
    print(f"restored {_summary(manifest)}")
    for name in previous:
        print(f"kept from before: {name}")
    for database in configured:
        if hint := schema.upgrade_hint(database, manifest.metadata["databases"]):
            print(hint)
    _warn_of_other_secrets(configured)
    return exit_codes.OK


def _use_secrets(configured: Sequence[databases.Database]) -> int:
    if not (folder := os.environ.get(SECRETS)):
        raise ConfigError(f"{SECRETS} is not set: give the folder of `make secrets`")
    for change in stored_secrets.use_secrets(configured, Path(folder)) or ["nothing to change"]:
        print(change)
    return exit_codes.OK


def _warn_of_other_secrets(configured: Sequence[databases.Database]) -> None:
    """Warn if MLflow could not start with the restored databases and the secrets of here."""
    if not (folder := os.environ.get(SECRETS)):
        log.warning(
            "%s is not set, so the archive is not compared with the secrets: see docs/backup.md",
            SECRETS,
        )
    elif names := stored_secrets.find_differing(configured, Path(folder)):
        log.warning(
            "the archive was saved with another %s than that in %s, so MLflow would not start: "
            "copy it from the archive's platform, or run `python -m deploy.backup use-secrets`",
            " and ".join(names),
            folder,
        )


if __name__ == "__main__":
    cli.run_command(main)
