"""Generate one of the platform's secrets anew: `python -m deploy.rotate admin_password`."""

import os
from collections.abc import Sequence
from pathlib import Path

from deploy import databases, postgresql, secrets, stored_secrets
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

DATABASE_PASSWORD = "postgres_password"  # noqa: S105 - the name of a file
ISSUED_ELSEWHERE = frozenset({"gcs_credentials", "backup_credentials"})
"""Secrets that Google Cloud issues."""
IN_COMPOSE = {
    DATABASE_PASSWORD: "docker compose exec postgres psql --username=mlflow "
    """--command="ALTER ROLE mlflow PASSWORD '$(cat {file})'" """,
    stored_secrets.PASSWORD: "docker compose run --rm backup use-secrets",
    stored_secrets.WEBHOOK_KEY: "docker compose run --rm backup use-secrets",
}
"""Commands that make a database in a container accept the new secret."""
RESTART = "make platform-down && make platform"
RESTART_COMPOSE = "docker compose up --wait --force-recreate"


def rotate(name: str, folder: Path, stores: Sequence[databases.Database]) -> list[str]:
    """Generate a secret anew, tell the databases, and return what else they changed.

    ``stores`` are the databases of a platform that runs without containers; empty if they cannot
    be reached from here.

    Raises:
        ConfigError: the name is none of a secret that is generated, or its file cannot be written.
        TrackingError: PostgreSQL cannot be reached, or refuses.
    """
    if name == DATABASE_PASSWORD and stores:
        password = secrets.GENERATORS[name]()
        with stored_secrets.new_database_password(stores[0], password.decode()):
            secrets.write(name, password, folder)
            postgresql.write_password_file(folder, password.decode())
        return []
    for file in {secrets.KEY, secrets.CERTIFICATE} if name == secrets.CERTIFICATE else {name}:
        (folder / file).unlink(missing_ok=True)
    secrets.make_missing(folder)
    return stored_secrets.use_secrets(stores, folder)


def main(argv: Sequence[str]) -> int:
    names = sorted({*secrets.GENERATORS, secrets.CERTIFICATE} - ISSUED_ELSEWHERE)
    parser = cli.parser("deploy.rotate", "Generate one of the platform's secrets anew.")
    parser.add_argument("name", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--folder", type=Path, help=f"default: EUROSAT_SECRETS, else {secrets.FOLDER}"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if args.name not in names:
        raise ConfigError(f"{args.name!r} is no secret that is generated: {', '.join(names)} are")
    folder = args.folder or Path(os.environ.get("EUROSAT_SECRETS", secrets.FOLDER))
    is_reachable = databases.DATABASE_SPECS[0].variable in os.environ
    stores = databases.from_environment(os.environ) if is_reachable else []
    for change in rotate(args.name, folder, stores):
        print(change)
    print(f"{folder / args.name} is new; now run")
    if is_reachable:
        print(f"  {RESTART}")
        return exit_codes.OK
    if command := IN_COMPOSE.get(args.name, "").strip():
        print(f"  {command.format(file=folder / args.name)}")
    print(f"  {RESTART_COMPOSE}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
