"""Install, list, test and remove MLflow's webhooks for `registry.receiver`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import receiver, versions, worker

if TYPE_CHECKING:
    from mlflow.entities.webhook import Webhook

NAME = "eurosat-registry"
"""Name of our webhook in MLflow."""


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.webhooks", "Manage the webhook that sends MLflow's events to registry.receiver."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="send events to the receiver at URL from now on")
    install.add_argument("url", metavar="URL", help="such as http://127.0.0.1:5002/webhook")
    for command, description in (
        ("list", "print all webhooks in MLflow"),
        ("test", "send one example of each event"),
        ("remove", "remove our webhook"),
    ):
        commands.add_parser(command, help=description)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    with tracking.translate_errors("webhooks"):
        if args.command == "install":
            return _install(args.url)
        return {"list": _list, "test": _test, "remove": _remove}[args.command]()


def installed() -> "list[Webhook]":
    """Return our webhooks, without others in the same MLflow."""
    return [hook for hook in versions.client().list_webhooks() if hook.name == NAME]


def _install(url: str) -> int:
    """Replace our webhook, so that no event is sent twice."""
    earlier = installed()
    created = versions.client().create_webhook(
        NAME,
        url,
        list(worker.EVENTS),
        description="judges registered versions",
        secret=receiver.webhook_secret(),
    )
    for hook in earlier:
        versions.client().delete_webhook(hook.webhook_id)
    print(created.webhook_id)
    return exit_codes.OK


def _list() -> int:
    hooks = [
        {
            "id": hook.webhook_id,
            "name": hook.name,
            "url": hook.url,
            "events": [str(event) for event in hook.events],
            "status": str(hook.status),
        }
        for hook in versions.client().list_webhooks()
    ]
    print(json.dumps(hooks, indent=1))
    return exit_codes.OK


def _test() -> int:
    hooks = installed()
    if not hooks:
        raise TrackingError(
            f"MLflow has no webhook {NAME}: run `python -m registry.webhooks install URL`"
        )
    failed = 0
    for event in worker.EVENTS:
        result = versions.client().test_webhook(hooks[0].webhook_id, event)
        failed += not result.success
        problem = result.error_message or f"status {result.response_status}"
        print(f"{event}: {'accepted' if result.success else problem}")
    return exit_codes.NEGATIVE if failed else exit_codes.OK


def _remove() -> int:
    hooks = installed()
    for hook in hooks:
        versions.client().delete_webhook(hook.webhook_id)
    print(f"{len(hooks)} removed")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
