"""Known faults of the locked packages, as the Python advisory database tells them: `make audit`."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

LOCKS = (
    Path("requirements.lock"),
    Path("deploy/mlflow/requirements.lock"),
    Path("deploy/postgres/requirements.lock"),
    Path("deploy/serving/requirements.lock"),
)
TIMEOUT_S = 300
UNREACHABLE = re.compile(r"connect|timed out|resol|retries|service|proxy|SSL", re.IGNORECASE)
"""In what pip-audit says where its database is out of reach."""


def faults(lock: Path) -> tuple[list[str], int]:
    """A line for each known fault, and how many packages the database knows.

    Raises:
        ConfigError: pip-audit cannot read the lock.
    """
    command = ["-m", "pip_audit", f"--requirement={lock}", "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [sys.executable, *command, "--format=json", "--progress-spinner=off"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [], 0
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines()
        if UNREACHABLE.search(done.stderr):
            return [], 0
        raise ConfigError(
            f"{lock} cannot be audited: {said[-1] if said else 'no reason'}"
        ) from None
    known = [package for package in packages if "skip_reason" not in package]
    return [
        f"{lock}: {package['name']} {package['version']}: {fault['id']}, mended in "
        f"{', '.join(fault['fix_versions']) or 'no release yet'}"
        for package in known
        for fault in package["vulns"]
    ], len(known)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("deploy.audit", "Known faults of the locked packages.")
    parser.add_argument("locks", nargs="*", type=Path, default=LOCKS, metavar="LOCK")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    found: list[str] = []
    for lock in args.locks:
        lines, known = faults(lock)
        found += lines
        if known:
            print(f"{lock}: {known} packages, {len(lines)} known faults")
        else:
            print(f"{lock}: not audited, as the advisory database cannot be reached from here")
    print("\n".join(found), end="\n" if found else "")
    return exit_codes.NEGATIVE if found else exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
