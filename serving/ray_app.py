"""The server on a Ray cluster, for more than one machine can answer: the same app in each replica.

Ray's proxies take the requests and spread them; each replica follows the alias by itself.
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
from eurosat.config import from_mapping as from_mapping
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs, ray_cluster
from serving.mlflow_server import CHAMPION
from serving.server import POLL_S, loopback

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.app import App

log = logging.getLogger(__name__)

NAME = "eurosat"

USAGE = """python -m serving.ray_app [key=value ...]

  ray_address=HEAD:6379   a cluster; without it one is started on this machine
  host=127.0.0.1 port=8000 replicas=1 cpus=1   model=models:/eurosat@champion
  poll=1 keys=FILE open=false form=auto|fp32|int8 max_batch=16 log_level=info
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    model: str = CHAMPION
    ray_address: str | None = None
    host: str = "127.0.0.1"
    """Where Ray's proxies listen; under ``serve run`` Ray's own settings say so."""
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0
    """Of each replica: the network uses one."""
    poll: float = POLL_S
    """Seconds between two looks at the alias."""
    keys: str | None = None
    """File of API keys (python -m serving.keys), on every node."""
    open: bool = False
    """Answer everybody, beyond loopback too."""
    form: Literal["auto", "fp32", "int8"] = "auto"
    max_batch: int = 16

    def __post_init__(self) -> None:
        for name in ("port", "replicas", "cpus", "poll", "max_batch"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name):g}")
        if not (self.keys or self.open or (loopback(self.host) and not self.ray_address)):
            raise ConfigError(
                f"{self.ray_address or self.host} can be reached by others: give keys=FILE "
                "(python -m serving.keys), or open=true to answer everybody"
            )


def read(words: Mapping[str, str]) -> RayConfig:
    """The settings that ``key=value`` words make.

    Raises:
        ConfigError: a word that does not exist or does not fit.
    """
    import yaml

    try:
        values = {name: yaml.safe_load(word) for name, word in words.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"not key=value: {' '.join(str(error).split())}") from error
    return from_mapping(RayConfig, values)


def build(words: Mapping[str, str]) -> "Application":
    """What ``serve run serving.ray_app:build`` deploys, where Ray's settings say who reaches it.

    Raises:
        ConfigError: a word that does not exist or does not fit.
    """
    config = read(words)
    if not (config.keys or config.open):
        raise ConfigError(
            "give keys=FILE (python -m serving.keys), or open=true: see Ray's proxies"
        )
    return application(config)


def application(config: RayConfig) -> "Application":
    from ray import serve

    from serving.limits import Limits

    def app() -> "App":  # built where it answers
        return replica(config)

    deployment: Any = serve.deployment(
        serve.ingress(app)(),
        name=NAME,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus},
        max_ongoing_requests=Limits().requests,  # the app's own limits refuse, in its own words
    )
    bound: Application = deployment.bind()
    return bound


def replica(config: RayConfig) -> "App":
    """The app of one replica."""
    from serving.app import App
    from serving.hot_swap import Follower
    from serving.keys import Keys
    from serving.limits import Limits
    from serving.metrics import Metrics

    logs.setup("info")
    keys = Keys.read(Path(config.keys), share=1 / config.replicas) if config.keys else None
    settings, metrics = {"form": config.form, "max_batch": config.max_batch}, Metrics()
    return App(Follower(config.model, settings, config.poll, metrics), metrics, Limits(), keys)


def main(argv: Sequence[str]) -> int:
    given = (word.partition("=") for word in cli.overrides(argv, USAGE))
    config = read({name: value for name, _, value in given})
    ray_cluster.join(config.ray_address, tracking.tracking_uri())
    from ray import serve

    ended = threading.Event()
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        serve.run(application(config), name=NAME, route_prefix="/")
        for number in (signal.SIGTERM, signal.SIGINT):  # before, they end a deployment that waits
            signal.signal(number, lambda *_: ended.set())
        log.info("serving %s on http://%s:%d", config.model, config.host, config.port)
        ended.wait()
    finally:
        if config.ray_address:
            serve.delete(NAME)  # others may serve on that cluster too
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
