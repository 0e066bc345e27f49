"""Users of the platform's MLflow and their roles: `make user NAME=ada ROLE=writer`."""

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs

ROLES = {
    "reader": {"experiment": "READ", "registered_model": "READ"},
    "writer": {"experiment": "EDIT", "registered_model": "EDIT"},
    "promoter": {"experiment": "EDIT", "registered_model": "MANAGE"},
}
"""Permissions that MLflow grants. `mlflow/role_policy.py` refuses writers who move an alias or
approve."""
WORKSPACE = "default"
TIMEOUT_S = 30
UNAUTHORIZED = 401
PASSWORD_BYTES = 18
MIN_PASSWORD_LENGTH = 12
"""Characters; MLflow's own limit."""


class UserAdmin:
    """Client of MLflow's REST API for users and roles, logged in as an administrator.

    Every method raises TrackingError if the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, name: str, password: str, verify: str | bool = True) -> None:
        self.url, self.name = url.rstrip("/"), name
        self._session = requests.Session()
        self._session.auth = (name, password)
        self._verify = (
            verify  # given with each request, as REQUESTS_CA_BUNDLE overrides the session's
        )

    def request(
        self, method: str, path: str, none_on: int | None = None, **fields: str | int
    ) -> dict[str, Any] | None:
        """Return the JSON answer; None if the server answers with the status ``none_on``."""
        is_get = method == "GET"
        try:
            response = self._session.request(
                method,
                f"{self.url}/api/{path}",
                params=fields if is_get else None,
                json=None if is_get else fields,
                timeout=TIMEOUT_S,
                verify=self._verify,
            )
        except requests.RequestException as error:
            raise TrackingError(f"{self.url} cannot be reached: {type(error).__name__}") from error
        if response.status_code == none_on:
            return None
        if response.status_code == UNAUTHORIZED:
            raise TrackingError(
                f"{self.url} refuses the password of {self.name}: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to an administrator; if users were restored from a "
                "backup, or the secret is new, run `python -m deploy.backup use-secrets` "
                "(docs/backup.md)"
            )
        if not response.ok:
            raise TrackingError(
                f"{self.url} refused {path} with {response.status_code}: "
                f"{response.text[:300].strip()}"
            )
        payload: dict[str, Any] = response.json() if response.content else {}
        return payload

    def ensure_role(self, name: str) -> int:
        """Return the id of a role, which is created with its permissions if it is missing."""
        payload = self.request("GET", "3.0/mlflow/roles/list", workspace=WORKSPACE) or {}
        ids = {role["name"]: int(role["id"]) for role in payload["roles"]}
        if name not in ids:
            created = self.request(
                "POST", "3.0/mlflow/roles/create", workspace=WORKSPACE, name=name
            )
            ids[name] = int((created or {})["role"]["id"])
        role_id = ids[name]
        payload = self.request("GET", "3.0/mlflow/roles/permissions/list", role_id=role_id) or {}
        granted = {entry["resource_type"] for entry in payload["role_permissions"]}
        for resource_type, permission in ROLES[name].items():
            if resource_type not in granted:
                self.request(
                    "POST",
                    "3.0/mlflow/roles/permissions/add",
                    role_id=role_id,
                    resource_type=resource_type,
                    resource_pattern="*",
                    permission=permission,
                )
        return role_id

    def add(self, name: str, role: str, password: str) -> bool:
        """Create a user, or give an existing user the role; return whether the user is new."""
        role_id = self.ensure_role(role)
        is_new = not self.request("GET", "2.0/mlflow/users/get", none_on=404, username=name)
        if is_new:
            self.request("POST", "2.0/mlflow/users/create", username=name, password=password)
        role_ids = self._role_ids(name)
        if role not in role_ids:
            self.request("POST", "3.0/mlflow/roles/assign", username=name, role_id=role_id)
        for other in role_ids.keys() & ROLES.keys() - {role}:
            self.request(
                "DELETE", "3.0/mlflow/roles/unassign", username=name, role_id=role_ids[other]
            )
        return is_new

    def set_password(self, name: str, password: str) -> None:
        path = "2.0/mlflow/users/update-password"
        self.request("PATCH", path, username=name, password=password)

    def remove(self, name: str) -> None:
        self.request("DELETE", "2.0/mlflow/users/delete", username=name)

    def roles_by_user(self) -> dict[str, str]:
        """Return each user's role: one of `ROLES`, ``administrator``, or empty."""
        payload = self.request("GET", "2.0/mlflow/users/list") or {}
        return {user["username"]: self._role_of(user) for user in payload["users"]}

    def _role_of(self, user: dict[str, Any]) -> str:
        if user["is_admin"]:
            return "administrator"
        return ", ".join(sorted(self._role_ids(user["username"]).keys() & ROLES.keys()))

    def _role_ids(self, name: str) -> dict[str, int]:
        payload = self.request("GET", "3.0/mlflow/users/roles/list", username=name) or {}
        return {role["name"]: int(role["id"]) for role in payload["roles"]}


def from_environment() -> UserAdmin:
    """Return a client for the server and the administrator that the environment names.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI, _USERNAME or _PASSWORD is not set.
    """
    login = {
        name: os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("URI", "USERNAME", "PASSWORD")
    }
    if missing := [f"MLFLOW_TRACKING_{name}" for name, value in login.items() if not value]:
        raise ConfigError(
            f"{' and '.join(missing)} not set: start the platform (make platform), or "
            "name the server and its administrator"
        )
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    return UserAdmin(str(login["URI"]), str(login["USERNAME"]), str(login["PASSWORD"]), verify)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.users", "Add, remove and list the users of the platform's MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="add a user and print the password; or change a role")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--role", choices=ROLES, default="reader")
    add.add_argument(
        "--password-file", type=Path, metavar="FILE", help="default: a random password"
    )
    remove = commands.add_parser("remove", help="delete a user")
    remove.add_argument("name", metavar="NAME")
    commands.add_parser("list", help="list names and roles")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    admin = from_environment()
    if args.command == "add":
        return _add(admin, args.name, args.role, args.password_file)
    if args.command == "remove":
        admin.remove(args.name)
    else:
        for name, role in admin.roles_by_user().items():
            print(f"{name}\t{role or 'no role: sees nothing'}")
    return exit_codes.OK


def _add(admin: UserAdmin, name: str, role: str, file: Path | None) -> int:
    try:
        password = file.read_text().strip() if file else secrets.token_urlsafe(PASSWORD_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as a password: {error}") from error
    if len(password) < MIN_PASSWORD_LENGTH:
        raise ConfigError(
            f"the password in {file} has {len(password)} characters; at least "
            f"{MIN_PASSWORD_LENGTH} are needed"
        )
    is_new = admin.add(name, role, password)
    if is_new and not file:
        _print_login(admin.url, name, password)
    else:
        print(f"{name} is a {role}")
    return exit_codes.OK


def _print_login(url: str, name: str, password: str) -> None:
    """Print what the user sets to log in from another machine (docs/howto/join-a-server.md)."""
    url = os.environ.get("EUROSAT_PUBLIC_URL", url)
    certificate = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
    print(f"MLFLOW_TRACKING_URI={url}")
    print(f"MLFLOW_TRACKING_USERNAME={name}\nMLFLOW_TRACKING_PASSWORD={password}")
    if certificate:
        print("MLFLOW_TRACKING_SERVER_CERT_PATH=tls.crt")
        print(f"# tls.crt: give {name} a copy of {certificate}; it is not secret", file=sys.stderr)
    if urlsplit(url).hostname in ("localhost", "127.0.0.1"):
        print(
            f"# {url} is reachable from this machine only: see docs/howto/team-without-docker.md, "
            "or PLATFORM_HOST in docs/platform.md",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run_command(main)
