"""Serve a registered model over HTTP, and follow its alias to new versions."""

import argparse
import ipaddress
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.hardware import cores
from serving.mlflow_server import CHAMPION

if TYPE_CHECKING:
    import uvicorn

    from serving.limits import Limits

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 10.0
POLL_INTERVAL_S = 1.0
"""Time between two polls of the alias."""
KEEP_ALIVE_S = 75
LIMIT_HELP = {
    "body_mb": "size of one request in MB",
    "tiles": "tiles in one request",
    "queue": "waiting tiles",
    "requests": "open requests",
    "bodies_mb": "size of all bodies and answers in memory in MB",
    "deadline_s": "seconds until a prediction must begin",
    "head_s": "seconds for a request line and its headers to arrive",
    "body_s": "seconds for a body to arrive",
    "answer_s": "seconds for a client to take an answer",
}
"""Field of `Limits` -> help text of its flag."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def uvicorn_config(app: Any, grace_s: float) -> "uvicorn.Config":
    import uvicorn

    from serving.protocol import GuardedHttpProtocol

    logging.getLogger("uvicorn.error").name = "uvicorn"  # it logs all messages, not errors alone
    return uvicorn.Config(
        app,
        http=GuardedHttpProtocol,
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(grace_s),
        timeout_keep_alive=KEEP_ALIVE_S,
    )


def main(argv: Sequence[str]) -> int:
    from serving import processes
    from serving.limits import Limits

    args = _parse(argv)
    logs.setup(args.log_level)
    limits = Limits(**{name: getattr(args, name) for name in LIMIT_HELP})
    _check(args)
    if processes.is_worker():
        return _serve(args, limits)
    log.info("serving %s on http://%s:%d", args.model, args.host, args.port)
    return processes.run([sys.executable, "-m", "serving.server", *argv], args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from serving.limits import Limits

    parser = cli.parser("serving.server", "Serve a registered model, and follow its alias.")
    add = parser.add_argument
    add("--model", default=CHAMPION, help=f"models:/ or runs:/ ({CHAMPION})")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=5001)
    add("--poll", type=float, default=POLL_INTERVAL_S, metavar="S", help="time between polls")
    add("--keys", type=Path, help="file of API keys (python -m serving.keys)")
    add("--no-auth", action="store_true", help="answer everybody, beyond loopback too")
    add("--grace", type=float, default=SHUTDOWN_GRACE_S, metavar="S", help="time to shut down")
    add("--processes", type=int, default=cores(), help="worker processes (one per core)")
    add("--precision", choices=("auto", "fp32", "int8"), default="auto", help="of the network")
    add("--max-batch", type=int, default=16, help="views of tiles in one batch")
    for name, text in LIMIT_HELP.items():
        flag, default = f"--max-{name.replace('_', '-')}", getattr(Limits(), name)
        add(flag, dest=name, type=type(default), default=default, help=f"{text} ({default:g})")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if not (is_loopback(args.host) or args.keys or args.no_auth):
        raise ConfigError(
            f"{args.host} can be reached by others: give --keys FILE (python -m serving.keys), "
            "or --no-auth to answer everybody"
        )
    for name in ("poll", "grace", "processes", "max_batch"):
        if not getattr(args, name) > 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be above 0; got {getattr(args, name):g}")


def _serve(args: argparse.Namespace, limits: "Limits") -> int:
    """Run one of the worker processes until it is stopped."""
    import uvicorn

    from serving import processes
    from serving.app import create_app

    processes.end_with_parent()
    app = create_app(
        args.model,
        {"precision": args.precision, "max_batch": args.max_batch},
        poll_s=args.poll,
        limits=limits.shared(args.processes),
        keys_file=args.keys,
        processes=args.processes,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.closing = True  # /ready answers 503 while requests in flight are answered
            super().handle_exit(sig, frame)

    server = Server(uvicorn_config(app, args.grace))
    server.run(sockets=[processes.listener(args.host, args.port)])
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
