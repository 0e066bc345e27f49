"""The platform's secrets: files that are generated once, in a folder that only its owner can enter.

The folder has mode 700. The files have mode 644, because docker compose mounts single files into
containers, which run as other users.
"""

import datetime
import ipaddress
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, exit_codes, logs

FOLDER = Path(".platform/secrets")
ROOT = Path(__file__).resolve().parents[1]
FILE_MODE = 0o644
PASSWORD_BYTES = 32
CERTIFICATE_DAYS = 825
"""The longest validity that browsers accept."""
HOSTS = ("localhost", "grafana.localhost", "proxy")
"""Hosts of the self-signed certificate, besides 127.0.0.1."""


def _password() -> bytes:
    return secrets.token_urlsafe(PASSWORD_BYTES).encode()


def _fernet_key() -> bytes:
    from cryptography.fernet import Fernet

    return Fernet.generate_key()


GENERATORS: dict[str, Callable[[], bytes]] = {
    "postgres_password": _password,
    "backup_key": _password,
    "admin_password": _password,
    "promoter_password": _password,
    "serving_password": _password,
    "trainer_password": _password,
    "flask_key": _password,
    "crypto_key": _password,
    "webhook_secret": _password,
    "webhook_key": _fernet_key,
    "gcs_credentials": lambda: b"{}",
    "backup_credentials": lambda: b"{}",
}
"""`postgres_password` is that of MLflow's account in PostgreSQL. `backup_key` seals archives.
`crypto_key` encrypts what administrators store in MLflow's gateway. `webhook_secret` signs
webhooks, and MLflow stores it encrypted with `webhook_key`. `gcs_credentials` and
`backup_credentials` are files to be filled: Google Cloud issues their content."""
KEY, CERTIFICATE = "tls.key", "tls.crt"
API_KEY, API_KEYS = "serving_key", "serving_keys"
"""A client's API key for serving, and the file of hashes that serving reads."""


def make_missing(folder: Path = FOLDER) -> list[str]:
    """Generate the secrets that are missing, and return their names.

    Raises:
        ConfigError: the folder cannot be written, or belongs to another user.
    """
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        generated = [name for name in GENERATORS if not (folder / name).exists()]
        for name in generated:
            _write(folder / name, GENERATORS[name]())
        if not ((folder / KEY).exists() and (folder / CERTIFICATE).exists()):
            key, certificate = self_signed()
            _write(folder / KEY, key)
            _write(folder / CERTIFICATE, certificate)
            generated += [KEY, CERTIFICATE]
        if not ((folder / API_KEY).exists() and (folder / API_KEYS).exists()):
            _write(folder / API_KEY, _api_key(folder / API_KEYS))
            generated += [API_KEY, API_KEYS]
        for name in (*GENERATORS, KEY, CERTIFICATE, API_KEY, API_KEYS):
            (folder / name).chmod(FILE_MODE)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot hold secrets ({error.strerror or error}): "
            "set its permissions, or give another folder"
        ) from error
    return generated


def read(name: str, folder: Path = FOLDER) -> str:
    """Return a secret.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    try:
        return (folder / name).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{folder / name} cannot be read: run `make secrets`") from error


def write(name: str, content: bytes, folder: Path = FOLDER) -> None:
    """Replace a secret."""
    _write(folder / name, content)
    (folder / name).chmod(FILE_MODE)


def _write(file: Path, content: bytes) -> None:
    atomic.atomic_write(file, lambda out: out.write(content))


def _api_key(hashes: Path) -> bytes:
    """Generate an API key, and write its hash to ``hashes``."""
    hashes.unlink(missing_ok=True)
    command = ["-m", "serving.keys", "platform", f"--file={hashes}"]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ConfigError(f"no API key can be generated: {result.stderr.strip()[-300:]}")
    return result.stdout.strip().encode()


def self_signed(hosts: Sequence[str] = HOSTS) -> tuple[bytes, bytes]:
    """Return a key and a certificate, both PEM. Clients trust the certificate as an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "EuroSAT platform")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [x509.DNSName(host) for host in hosts]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # some clocks are behind
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.secrets", "Generate the platform's secrets that are missing.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    generated = make_missing(args.folder)
    print(f"{args.folder}: {', '.join(generated) or 'nothing was missing'}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
