"""One archive of the platform: its databases and its artifacts. See docs/backup.md."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from deploy import archive, databases, schema
from deploy.restore import restore
from deploy.save import save
from deploy.transfer import open_checked
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

log = logging.getLogger(__name__)

ARTIFACTS = "EUROSAT_ARTIFACTS"


@contextmanager
def _open_archive(url: str, setting: str) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the archive as a stream, and its size in bytes."""
    folder, _, key = url.rpartition("/")
    store = open_checked(folder or ("/" if url.startswith("/") else "."), setting)
    info = store.find(key)
    if info is None:
        raise ConfigError(f"{setting} {url}: there is no such archive")
    with store.open(info) as stream:
        yield stream, info.size


def _told(manifest: archive.Manifest) -> str:
    rows = manifest.told["databases"]["mlflow"]["rows"]
    artifacts = manifest.below(archive.ARTIFACTS)
    size = sum(member.size for member in artifacts)
    return (
        f"{rows['runs']} runs, {rows['metrics']} metric points, {rows['model_versions']} model "
        f"versions, {len(artifacts)} artifacts ({size / 1e6:,.1f} MB), "
        f"of {manifest.told['created']}"
    )


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "deploy.backup",
        "Databases and artifacts of the platform as one archive. Reads EUROSAT_DATABASE_URI, "
        "EUROSAT_AUTH_DATABASE_URI, PGPASSFILE, EUROSAT_ARTIFACTS, STORAGE_EMULATOR_HOST.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    saving = verbs.add_parser("save", help="while runs are being written")
    saving.add_argument("--to", required=True, metavar="DIR|gs://BUCKET/PREFIX")
    verifying = verbs.add_parser("verify", help="read all of an archive; exit 2 if it is not whole")
    verifying.add_argument("file", metavar="FILE|gs://BUCKET/NAME")
    restoring = verbs.add_parser("restore", help="with the MLflow server stopped")
    restoring.add_argument("--from", required=True, dest="file", metavar="FILE|gs://BUCKET/NAME")
    restoring.add_argument(
        "--replace", action="store_true", help="what the target holds is kept beside"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if args.verb == "verify":
        with _open_archive(args.file, "verify") as (stream, size):
            print(f"whole: {_told(archive.verify(stream, size))}")
        return exit_codes.OK
    found = databases.configured(os.environ)
    if not (uri := os.environ.get(ARTIFACTS)):
        raise ConfigError(f"{ARTIFACTS} is not set: gs://bucket/prefix, or a folder")
    artifacts = open_checked(uri, ARTIFACTS)
    if args.verb == "save":
        address, manifest = save(found, artifacts, open_checked(args.to, "--to"))
        log.info("saved %s", _told(manifest))
        print(address)
        return exit_codes.OK
    with _open_archive(args.file, "--from") as (stream, size):
        manifest, left = restore(stream, size, found, artifacts, replace=args.replace)
    print(f"restored {_told(manifest)}")
    for name in left:
        print(f"kept of before: {name}")
    for database in found:
        if advice := schema.upgrade(database, manifest.told["databases"]):
            print(advice)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
