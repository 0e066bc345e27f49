"""The user's settings and the servers that they name, shared by the checks of one call."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eurosat import tracking
from eurosat.doctor.findings import NotApplicable
from eurosat.doctor.http import Bearer, HttpProbe
from eurosat.runtime import env_file

CHECKOUT = Path(__file__).resolve().parents[2]
TRACKING_URI, PROMOTER_URL = "MLFLOW_TRACKING_URI", "EUROSAT_PROMOTER_URL"
SERVING_URL = "EUROSAT_SERVING_URL"
START_PLATFORM = "start the platform (`make platform`, or docker compose)"


@dataclass(kw_only=True)
class DoctorContext:
    """The settings and servers of one call; leaving the ``with`` block runs the cleanup."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    folder: Path = field(default_factory=Path.cwd)
    lock_file: Path = CHECKOUT / "requirements.lock"
    min_free_gb: float = 2.0
    """Free space required on every disk that is written to, in GB (10^9 bytes)."""
    timeout_s: float = 10.0
    """Time limit of one request."""
    authenticated: bool = False
    """Whether the tracking server has accepted our credentials."""
    username: str = ""
    """Our account on the tracking server; empty on a server without accounts."""
    cleanup: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "DoctorContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup.close()

    @cached_property
    def tracking(self) -> HttpProbe:
        """The tracking server, with the credentials that MLflow's client would use.

        Raises:
            NotApplicable: runs go to a local store.
        """
        if not (uri := self.environ.get(TRACKING_URI, "")):
            raise NotApplicable(
                f"{TRACKING_URI} is not set: runs go to ./mlflow.db, without a server"
            )
        if urlsplit(uri).scheme not in ("http", "https"):
            raise NotApplicable(f"{TRACKING_URI}={uri} is a store without a server")
        credentials = tracking.credentials()
        auth: Any = Bearer(credentials.token) if credentials.token else None
        if credentials.username and credentials.password:
            auth = (credentials.username, credentials.password)
        remedy = f"{START_PLATFORM}, or set {TRACKING_URI} to a running server"
        if self.has_env_file:
            remedy = f"start the platform again (`make platform`), or remove {env_file.FILE}"
        return HttpProbe(
            name="tracking server",
            url=uri.rstrip("/"),
            timeout_s=self.timeout_s,
            remedy=remedy,
            auth=auth,
            verify=credentials.verify,
        )

    @cached_property
    def promoter(self) -> HttpProbe:
        return self._probe("promoter", PROMOTER_URL)

    @cached_property
    def serving(self) -> HttpProbe:
        return self._probe("serving", SERVING_URL)

    def _probe(self, name: str, variable: str) -> HttpProbe:
        if not (url := self.environ.get(variable)):
            raise NotApplicable(f"{variable} is not set")
        remedy = f"{START_PLATFORM}, or set {variable} to a running one"
        return HttpProbe(name=name, url=url.rstrip("/"), timeout_s=self.timeout_s, remedy=remedy)

    @property
    def has_env_file(self) -> bool:
        """Whether the folder has a platform's file, which may be older than the platform."""
        return (self.folder / env_file.FILE).exists()

    def contacted_servers(self) -> list[HttpProbe]:
        """Return the servers that a check has used so far."""
        names = ("tracking", "promoter", "serving")
        return [self.__dict__[name] for name in names if name in self.__dict__]
