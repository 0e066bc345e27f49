"""Users of the platform's MLflow and what each may do: `make user NAME=ada ROLE=writer`."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs

ROLES = {
    "reader": {"experiment": "READ", "registered_model": "READ"},
    "writer": {"experiment": "EDIT", "registered_model": "EDIT"},
    "promoter": {"experiment": "EDIT", "registered_model": "MANAGE"},
}
"""What MLflow grants. `role_policy.py` refuses a writer who moves an alias or approves."""
WORKSPACE = "default"
TIMEOUT_S = 30
BYTES = 18
LEAST = 12
"""Characters of a password: what MLflow itself asks for."""


class Server:
    """MLflow's own REST calls for users and roles, as its administrator makes them.

    Raises:
        TrackingError: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, name: str, password: str, verify: str | bool = True) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.auth = (name, password)
        self._verify = verify  # of each request: a session's own yields to REQUESTS_CA_BUNDLE

    def ask(
        self, method: str, call: str, absent: int | None = None, **told: str | int
    ) -> dict[str, Any] | None:
        """None where the server answers with the status ``absent``."""
        asks = method == "GET"
        try:
            answer = self._session.request(
                method,
                f"{self.url}/api/{call}",
                params=told if asks else None,
                json=None if asks else told,
                timeout=TIMEOUT_S,
                verify=self._verify,
            )
        except requests.RequestException as error:
            raise TrackingError(f"{self.url} cannot be reached: {type(error).__name__}") from error
        if answer.status_code == absent:
            return None
        if not answer.ok:
            raise TrackingError(
                f"{self.url} refused {call} with {answer.status_code}: {answer.text[:300].strip()}"
            )
        read: dict[str, Any] = answer.json() if answer.content else {}
        return read

    def role(self, name: str) -> int:
        """Its id; it and its grants are made where they are not there."""
        listed = self.ask("GET", "3.0/mlflow/roles/list", workspace=WORKSPACE) or {}
        known = {role["name"]: int(role["id"]) for role in listed["roles"]}
        if name not in known:
            call = "3.0/mlflow/roles/create"
            made = self.ask("POST", call, workspace=WORKSPACE, name=name) or {}
            known[name] = int(made["role"]["id"])
        number = known[name]
        told = self.ask("GET", "3.0/mlflow/roles/permissions/list", role_id=number) or {}
        granted = {one["resource_type"] for one in told["role_permissions"]}
        for kind, grant in ROLES[name].items():
            if kind not in granted:
                self.ask(
                    "POST",
                    "3.0/mlflow/roles/permissions/add",
                    role_id=number,
                    resource_type=kind,
                    resource_pattern="*",
                    permission=grant,
                )
        return number

    def add(self, name: str, role: str, password: str) -> bool:
        """Whether the user is new; one who is there changes roles."""
        number = self.role(role)
        new = not self.ask("GET", "2.0/mlflow/users/get", absent=404, username=name)
        if new:
            self.ask("POST", "2.0/mlflow/users/create", username=name, password=password)
        listed = self.ask("GET", "3.0/mlflow/users/roles/list", username=name) or {}
        has = {one["name"]: int(one["id"]) for one in listed["roles"]}
        if role not in has:
            self.ask("POST", "3.0/mlflow/roles/assign", username=name, role_id=number)
        for other in has.keys() & ROLES.keys() - {role}:
            self.ask("DELETE", "3.0/mlflow/roles/unassign", username=name, role_id=has[other])
        return new

    def reset(self, name: str, password: str) -> None:
        call = "2.0/mlflow/users/update-password"
        self.ask("PATCH", call, username=name, password=password)

    def remove(self, name: str) -> None:
        self.ask("DELETE", "2.0/mlflow/users/delete", username=name)

    def all(self) -> dict[str, str]:
        """Role, or "administrator", or nothing, by name."""
        listed = self.ask("GET", "2.0/mlflow/users/list") or {}
        return {user["username"]: self._role_of(user) for user in listed["users"]}

    def _role_of(self, user: dict[str, Any]) -> str:
        if user["is_admin"]:
            return "administrator"
        told = self.ask("GET", "3.0/mlflow/users/roles/list", username=user["username"]) or {}
        return ", ".join(sorted({role["name"] for role in told["roles"]} & ROLES.keys()))


def administrator() -> Server:
    """The server, asked as the user whom the environment names.

    Raises:
        ConfigError: it names no server or nobody.
    """
    told = {
        name: os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("URI", "USERNAME", "PASSWORD")
    }
    if missing := [f"MLFLOW_TRACKING_{name}" for name, value in told.items() if not value]:
        raise ConfigError(
            f"{' and '.join(missing)} are not set: start the platform (make platform), or "
            "name the server and its administrator"
        )
    verify = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    return Server(str(told["URI"]), str(told["USERNAME"]), str(told["PASSWORD"]), verify)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.users", "Users of the platform's MLflow, and what each may do.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add", help="a new user, whose password is printed; or another role")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--role", choices=ROLES, default="reader")
    add.add_argument("--password-file", type=Path, metavar="FILE", help="default: one is made")
    remove = verbs.add_parser("remove", help="lock a user out")
    remove.add_argument("name", metavar="NAME")
    verbs.add_parser("list", help="names and roles")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    server = administrator()
    if args.verb == "add":
        return _add(server, args.name, args.role, args.password_file)
    if args.verb == "remove":
        server.remove(args.name)
    else:
        for name, role in server.all().items():
            print(f"{name}\t{role or 'no role: sees nothing'}")
    return exit_codes.OK


def _add(server: Server, name: str, role: str, file: Path | None) -> int:
    try:
        password = file.read_text().strip() if file else secrets.token_urlsafe(BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as a password: {error}") from error
    if len(password) < LEAST:
        raise ConfigError(f"{file} holds {len(password)} characters; at least {LEAST} are needed")
    new = server.add(name, role, password)
    if new and not file:
        print(f"MLFLOW_TRACKING_USERNAME={name}\nMLFLOW_TRACKING_PASSWORD={password}")
    else:
        print(f"{name} is a {role}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
