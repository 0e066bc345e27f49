"""Serve a registered model on a Ray cluster: the same app as `serving.server` in each replica.

Ray's proxies spread the requests over the replicas; each replica follows the alias by itself.
`serve run serving.ray_app:build keys=FILE` deploys it too.
"""

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat import tracking
from eurosat.config import from_mapping
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs, ray_cluster
from serving.mlflow_server import CHAMPION
from serving.server import POLL_INTERVAL_S, is_loopback

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.app import App

log = logging.getLogger(__name__)

NAME = "eurosat"

USAGE = """python -m serving.ray_app [key=value ...]

  ray_address=HEAD:6379   an existing cluster; without it one is started on this machine
  host=127.0.0.1 port=8000 replicas=1 cpus=1   model=models:/eurosat@champion
  poll=1 keys=FILE no_auth=false precision=auto|fp32|int8 max_batch=16 log_level=info
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    model: str = CHAMPION
    ray_address: str | None = None
    host: str = "127.0.0.1"
    """Address of Ray's proxies; ignored by ``serve run``, which uses Ray's own settings."""
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0
    """Cores of each replica; the network uses one."""
    poll: float = POLL_INTERVAL_S
    """Seconds between two polls of the alias."""
    keys: str | None = None
    """File of API keys (python -m serving.keys), which every node can read."""
    no_auth: bool = False
    """Answer everybody, beyond loopback too."""
    precision: Literal["auto", "fp32", "int8"] = "auto"
    max_batch: int = 16
    """Views of tiles in one batch."""

    def __post_init__(self) -> None:
        for name in ("port", "replicas", "cpus", "poll", "max_batch"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name):g}")
        local = is_loopback(self.host) and not self.ray_address
        if not (self.keys or self.no_auth or local):
            raise ConfigError(
                f"{self.ray_address or self.host} can be reached by others: give keys=FILE "
                "(python -m serving.keys), or no_auth=true to answer everybody"
            )


def parse_config(overrides: Mapping[str, str]) -> RayConfig:
    """Return the configuration with ``overrides``, whose values are YAML.

    Raises:
        ConfigError: a key is unknown, or a value is not of its type.
    """
    import yaml

    try:
        values = {name: yaml.safe_load(text) for name, text in overrides.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"not key=value: {' '.join(str(error).split())}") from error
    return from_mapping(RayConfig, values)


def build(overrides: Mapping[str, str]) -> "Application":
    """Return what ``serve run serving.ray_app:build`` deploys.

    Raises:
        ConfigError: a key is unknown or a value malformed, or there are no API keys although
            Ray's own settings decide who can reach the proxies.
    """
    config = parse_config(overrides)
    if not (config.keys or config.no_auth):
        raise ConfigError(
            "Ray's proxies may be reached by others: give keys=FILE (python -m serving.keys), or "
            "no_auth=true to answer everybody"
        )
    return application(config)


def application(config: RayConfig) -> "Application":
    from ray import serve

    from serving.limits import Limits

    def app() -> "App":  # called in each replica
        return replica(config)

    deployment: Any = serve.deployment(
        serve.ingress(app)(),
        name=NAME,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus},
        max_ongoing_requests=Limits().requests,  # the app's own limits answer with our errors
    )
    bound: Application = deployment.bind()
    return bound


def replica(config: RayConfig) -> "App":
    """Return the app of one replica."""
    from serving.app import create_app
    from serving.limits import Limits

    logs.setup("info")
    return create_app(
        config.model,
        {"precision": config.precision, "max_batch": config.max_batch},
        poll_s=config.poll,
        limits=Limits(),
        keys_file=Path(config.keys) if config.keys else None,
        processes=config.replicas,
    )


def main(argv: Sequence[str]) -> int:
    words = (word.partition("=") for word in cli.overrides(argv, USAGE))
    config = parse_config({name: value for name, _, value in words})
    ray_cluster.join(config.ray_address, tracking.tracking_uri())
    from ray import serve

    stopped = threading.Event()
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        serve.run(application(config), name=NAME, route_prefix="/")
        for number in (signal.SIGTERM, signal.SIGINT):  # earlier ones interrupt a slow deployment
            signal.signal(number, lambda *_: stopped.set())
        log.info("serving %s on http://%s:%d", config.model, config.host, config.port)
        stopped.wait()
    finally:
        if config.ray_address:
            serve.delete(NAME)  # the cluster may serve other applications too
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
