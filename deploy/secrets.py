"""The platform's secrets, as files of a folder that only its owner enters: made once.

The folder is closed (mode 700); the files in it can be read by whom they are handed to, as the
containers of docker compose run as users of their own.
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
READABLE = 0o644
BYTES = 32
VALID_DAYS = 825
"""What browsers accept of a certificate at most."""
HOSTS = ("localhost", "proxy")
"""Whom the self-made certificate is for, 127.0.0.1 aside."""


def _password() -> bytes:
    return secrets.token_urlsafe(BYTES).encode()


def _fernet_key() -> bytes:
    from cryptography.fernet import Fernet

    return Fernet.generate_key()


MADE: dict[str, Callable[[], bytes]] = {
    "postgres_password": _password,
    "admin_password": _password,
    "promoter_password": _password,
    "serving_password": _password,
    "trainer_password": _password,
    "flask_key": _password,
    "webhook_secret": _password,
    "webhook_key": _fernet_key,
    "gcs_credentials": lambda: b"{}",
}
"""Webhooks are signed with the secret, and MLflow keeps it encrypted with the key. Credentials of
Google Cloud are given, not made: the file is there to be filled."""
KEY, CERTIFICATE = "tls.key", "tls.crt"
API_KEY, API_KEYS = "serving_key", "serving_keys"
"""A client's key to serving, and the file of hashes that serving reads."""


def make(folder: Path = FOLDER) -> list[str]:
    """Those that were missing are made; their names.

    Raises:
        ConfigError: the folder is not the user's alone, or cannot be written.
    """
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        made = [name for name in MADE if not (folder / name).exists()]
        for name in made:
            atomic.atomic_write(folder / name, lambda file, name=name: file.write(MADE[name]()))  # type: ignore[misc]
        if not ((folder / KEY).exists() and (folder / CERTIFICATE).exists()):
            key, certificate = self_signed()
            atomic.atomic_write(folder / KEY, lambda file: file.write(key))
            atomic.atomic_write(folder / CERTIFICATE, lambda file: file.write(certificate))
            made += [KEY, CERTIFICATE]
        if not ((folder / API_KEY).exists() and (folder / API_KEYS).exists()):
            atomic.atomic_write(
                folder / API_KEY, lambda file: file.write(_api_key(folder / API_KEYS))
            )
            made += [API_KEY, API_KEYS]
        for name in (*MADE, KEY, CERTIFICATE, API_KEY, API_KEYS):
            (folder / name).chmod(READABLE)
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold secrets: {error.strerror or error}") from error
    return made


def read(name: str, folder: Path = FOLDER) -> str:
    """One of them.

    Raises:
        ConfigError: there is none.
    """
    try:
        return (folder / name).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{folder / name} cannot be read: run `make secrets`") from error


def _api_key(hashes: Path) -> bytes:
    hashes.unlink(missing_ok=True)
    command = ["-m", "serving.keys", "platform", f"--file={hashes}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"no API key can be made: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().encode()


def self_signed(hosts: Sequence[str] = HOSTS) -> tuple[bytes, bytes]:
    """Key and certificate, PEM. Clients name the certificate as the authority that they trust."""
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
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks that are a little behind
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
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
    parser = cli.parser("deploy.secrets", "Make the platform's secrets, those that are missing.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    made = make(args.folder)
    print(f"{args.folder}: {', '.join(made) or 'nothing was missing'}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
