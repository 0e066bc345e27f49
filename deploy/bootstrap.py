"""Introduce the platform's services to its MLflow: their users, the model's names, the webhook.

It can be run at every start: what is there already stays, and passwords become those of the files.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy import secrets, users
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

SERVICES = {"promoter": "promoter", "serving": "reader", "trainer": "writer"}
"""Their roles."""
MODELS = ("eurosat", "eurosat.ledger")
"""MLflow does not tell a reader that a name is free from that it is not for him."""


def introduce(server: users.Server, folder: Path, webhook: str) -> None:
    """``webhook`` is where the promoter listens.

    Raises:
        TrackingError: the server cannot be reached, or refuses.
        ConfigError: a secret is missing, or the webhook cannot be installed.
    """
    for name, role in SERVICES.items():
        password = secrets.read(f"{name}_password", folder)
        if not server.add(name, role, password):
            server.reset(name, password)  # its file may have been made anew
    for model in MODELS:
        server.ask("POST", "2.0/mlflow/registered-models/create", absent=400, name=model)
    done = subprocess.run(
        [sys.executable, "-m", "registry.webhooks", "install", webhook],
        env=os.environ | {"MLFLOW_WEBHOOK_SECRET": secrets.read("webhook_secret", folder)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ConfigError(f"the webhook cannot be installed: {done.stderr.strip()[-300:]}")


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.bootstrap", "Introduce the platform's services to its MLflow.")
    parser.add_argument("--webhook", required=True, metavar="URL", help="the promoter's")
    parser.add_argument("--secrets", type=Path, default=secrets.FOLDER, metavar="FOLDER")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", secrets.read("admin_password", args.secrets))
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", "admin")
    introduce(users.administrator(), args.secrets, args.webhook)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
