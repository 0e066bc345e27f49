"""MLflow's own registry webhooks: made, listed, tried and removed."""

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


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.webhooks", "Let MLflow tell registry.receiver what changes.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    install = verbs.add_parser("install", help="tell the receiver at URL from now on")
    install.add_argument("url", metavar="URL", help="such as http://127.0.0.1:5002/webhook")
    for verb, said in (
        ("list", "those that MLflow has"),
        ("test", "send one of each event"),
        ("remove", "tell nobody any more"),
    ):
        verbs.add_parser(verb, help=said)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    with tracking.translate_errors("webhooks"):
        if args.verb == "install":
            return _install(args.url)
        return {"list": _list, "test": _test, "remove": _remove}[args.verb]()


def installed() -> "list[Webhook]":
    """Ours, of all that MLflow has."""
    return [hook for hook in versions.client().list_webhooks() if hook.name == NAME]


def _install(url: str) -> int:
    """In the place of one that was there, so that no event is told twice."""
    before = installed()
    hook = versions.client().create_webhook(
        NAME,
        url,
        list(worker.EVENTS),
        description="judges what is registered",
        secret=receiver.secret(),
    )
    for old in before:
        versions.client().delete_webhook(old.webhook_id)
    print(hook.webhook_id)
    return exit_codes.OK


def _list() -> int:
    told = [
        {
            "id": hook.webhook_id,
            "name": hook.name,
            "url": hook.url,
            "events": [str(event) for event in hook.events],
            "status": str(hook.status),
        }
        for hook in versions.client().list_webhooks()
    ]
    print(json.dumps(told, indent=1))
    return exit_codes.OK


def _test() -> int:
    hooks = installed()
    if not hooks:
        raise TrackingError(
            "there is no webhook of ours: `python -m registry.webhooks install URL`"
        )
    failed = 0
    for event in worker.EVENTS:
        told = versions.client().test_webhook(hooks[0].webhook_id, event)
        failed += not told.success
        print(f"{event}: {'taken' if told.success else told.error_message or told.response_status}")
    return exit_codes.NEGATIVE if failed else exit_codes.OK


def _remove() -> int:
    hooks = installed()
    for hook in hooks:
        versions.client().delete_webhook(hook.webhook_id)
    print(f"{len(hooks)} removed")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
