"""Set up the platform's services in its MLflow: users, the models, the experiment, the webhook.

It may run at every start: it keeps what exists, and sets the services' passwords to the secrets.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy import secrets, users
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

SERVICE_ROLES = {"promoter": "promoter", "serving": "reader", "trainer": "writer"}
MODELS = ("eurosat", "eurosat.ledger")
"""Models that must exist: to a reader, MLflow reports a missing model as a forbidden one."""

EXPERIMENT = "eurosat"
"""Experiment of all trainings (`experiment` in eurosat/conf/config.yaml). MLflow lets whoever
creates an experiment delete it, so it belongs to the administrator."""

WEBHOOK_ATTEMPTS = 3
"""How often MLflow is asked for its webhooks: one that has just started may answer 500."""


def bootstrap(admin: users.UserAdmin, folder: Path, webhook: str) -> None:
    """Create users, models, the experiment and the webhook; ``folder`` holds the secrets.

    ``webhook`` is the URL on which the promoter listens.

    Raises:
        TrackingError: the server cannot be reached, or refuses.
        ConfigError: a secret is missing, or the webhook cannot be installed.
    """
    for name, role in SERVICE_ROLES.items():
        password = secrets.read(f"{name}_password", folder)
        if not admin.add(name, role, password):
            admin.set_password(name, password)  # the secret may have been generated anew
    for model in MODELS:
        admin.request("POST", "2.0/mlflow/registered-models/create", none_on=400, name=model)
    if not _can_read_webhooks(admin):
        raise ConfigError(
            f"MLflow cannot read its webhooks, as {folder / 'webhook_key'} is not the key that "
            "they were stored with: copy the key of before, or run "
            "`python -m deploy.backup use-secrets` (docs/backup.md)"
        )
    admin.request("POST", "2.0/mlflow/experiments/create", none_on=400, name=EXPERIMENT)
    result = subprocess.run(
        [sys.executable, "-m", "registry.webhooks", "install", webhook],
        env=os.environ | {"MLFLOW_WEBHOOK_SECRET": secrets.read("webhook_secret", folder)},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise ConfigError(f"the webhook cannot be installed: {result.stderr.strip()[-300:]}")


def _can_read_webhooks(admin: users.UserAdmin) -> bool:
    """Whether MLflow lists its webhooks; with another key than theirs it answers 500 each time."""
    for attempt in range(WEBHOOK_ATTEMPTS):
        if admin.request("GET", "2.0/mlflow/webhooks", none_on=500) is not None:
            return True
        if attempt + 1 < WEBHOOK_ATTEMPTS:
            time.sleep(1)
    return False


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.bootstrap", "Set up the platform's services in its MLflow.")
    parser.add_argument("--webhook", required=True, metavar="URL", help="of the promoter")
    parser.add_argument(
        "--secrets", type=Path, default=secrets.FOLDER, metavar="FOLDER", help="of make secrets"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", secrets.read("admin_password", args.secrets))
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", "admin")
    bootstrap(users.from_environment(), args.secrets, args.webhook)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
