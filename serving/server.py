"""Serve the champion: pictures in, batched, swapped while it runs, MLflow's protocol beside."""

import argparse
import ipaddress
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
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

GRACE_S = 10.0
POLL_S = 1.0


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def config(app: Any, grace_s: float) -> "uvicorn.Config":
    import uvicorn

    from serving.protocol import Protocol

    return uvicorn.Config(
        app,
        http=Protocol,
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(grace_s),
        timeout_keep_alive=75,
    )


def main(argv: Sequence[str]) -> int:
    from serving import processes
    from serving.limits import Limits

    parser = cli.parser("serving.server", "Serve a registered model, and follow its alias.")
    parser.add_argument("--model", default=CHAMPION, help=f"models:/ or runs:/ ({CHAMPION})")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5001)
    parser.add_argument("--poll", type=float, default=POLL_S, metavar="S", help="asks the alias")
    parser.add_argument("--keys", type=Path, help="API keys (python -m serving.keys)")
    parser.add_argument("--open", action="store_true", help="answer everybody, beyond loopback too")
    parser.add_argument("--grace", type=float, default=GRACE_S, metavar="S", help="to shut down")
    parser.add_argument("--processes", type=int, default=cores(), help="one per core, or fewer")
    parser.add_argument("--form", choices=("auto", "fp32", "int8"), default="auto")
    parser.add_argument("--max-batch", type=int, default=16, help="views of tiles in a batch")
    for field in fields(Limits):
        flag = f"--max-{field.name.replace('_', '-')}"
        kind = type(field.default)
        parser.add_argument(flag, dest=field.name, type=kind, default=field.default)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    bounds = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    _check(args)
    if processes.is_worker():
        return _serve(args, bounds)
    log.info("serving %s on http://%s:%d", args.model, args.host, args.port)
    return processes.run([sys.executable, "-m", "serving.server", *argv], args)


def _check(args: argparse.Namespace) -> None:
    if not (loopback(args.host) or args.keys or args.open):
        raise ConfigError(
            f"{args.host} can be reached by others: give --keys FILE (python -m serving.keys), "
            "or --open to answer everybody"
        )
    for name in ("poll", "grace", "processes", "max_batch"):
        if not getattr(args, name) > 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be above 0; got {getattr(args, name):g}")


def _serve(args: argparse.Namespace, bounds: "Limits") -> int:
    """One of the processes."""
    import uvicorn

    from serving import processes
    from serving.app import App
    from serving.hot_swap import Follower
    from serving.keys import Keys
    from serving.metrics import Metrics

    processes.end_with_parent()
    keys = Keys.read(args.keys, share=1 / args.processes) if args.keys else None
    settings, metrics = {"form": args.form, "max_batch": args.max_batch}, Metrics()
    follower = Follower(args.model, settings, args.poll, metrics)
    app = App(follower, metrics, bounds.shared(args.processes), keys)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.closing = True  # no longer ready, while it answers what it was asked
            super().handle_exit(sig, frame)

    server = Server(config(app, args.grace))
    server.run(sockets=[processes.listener(args.host, args.port)])
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
