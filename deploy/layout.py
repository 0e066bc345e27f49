"""Where the platform without containers keeps its files, and how its services are reached."""

import os
from dataclasses import dataclass
from pathlib import Path

from deploy import postgresql, secrets
from deploy.addresses import Addresses

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "mlflow"
ARTIFACTS_URL = f"gs://{BUCKET}/artifacts"


@dataclass(frozen=True)
class Layout:
    """Paths, addresses and environments of one platform."""

    folder: Path
    """Absolute path of everything that the platform writes."""
    addresses: Addresses

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def env(self) -> Path:
        """File with the environment of clients; it exists while the platform is up."""
        return self.folder / "env"

    @property
    def password_file(self) -> Path:
        """Password of the database, in libpq's format."""
        return self.secrets / postgresql.PASSWORD_FILE

    @property
    def auth_ini(self) -> Path:
        return self.folder / "auth.ini"

    @property
    def gates(self) -> Path:
        """The team's own file of gates; may be missing."""
        return self.folder / "gates.toml"

    @property
    def database(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.addresses.ports['postgres']}/mlflow"

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.addresses.ports[service]}"

    def login_env(self, user: str) -> dict[str, str]:
        """Return the environment of a client that logs in to MLflow as ``user``."""
        return {
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self._secret(f"{user}_password"),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }

    def client_env(self) -> dict[str, str]:
        """Return the environment that every command of the project reads from `env`."""
        return self.login_env("admin") | {
            "EUROSAT_SERVING_URL": self.url("serving"),
            "EUROSAT_PROMOTER_URL": self.url("promoter"),
            "EUROSAT_DATABASE_URI": self.database,
            "PGPASSFILE": str(self.password_file),
            "EUROSAT_ARTIFACTS": ARTIFACTS_URL,
            "STORAGE_EMULATOR_HOST": self.url("store"),
            "EUROSAT_SECRETS": str(self.secrets),
            **self._gates_env(),
            **({"EUROSAT_PUBLIC_URL": url} if (url := self.addresses.public_url) else {}),
        }

    def promoter_env(self) -> dict[str, str]:
        secret = {"MLFLOW_WEBHOOK_SECRET": self._secret("webhook_secret")}
        return self.login_env("promoter") | secret | self._gates_env()

    def _gates_env(self) -> dict[str, str]:
        return {"EUROSAT_GATES": str(self.gates)} if self.gates.exists() else {}

    def mlflow_env(self) -> dict[str, str]:
        plugins = [str(ROOT / "deploy" / "mlflow"), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(plugins),
            "PGPASSFILE": str(self.password_file),
            "STORAGE_EMULATOR_HOST": self.url("store"),
            "MLFLOW_AUTH_CONFIG_PATH": str(self.auth_ini),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._secret("admin_password"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret("flask_key"),
            "MLFLOW_CRYPTO_KEK_PASSPHRASE": self._secret("crypto_key"),
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": self._secret("webhook_key"),
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "0",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        }

    def _secret(self, name: str) -> str:
        return secrets.read(name, self.secrets)
