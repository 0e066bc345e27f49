"""Known vulnerabilities of the locked packages, from the Python advisory database: `make audit`."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

LOCK_FILES = (
    Path("requirements.lock"),
    Path("deploy/mlflow/requirements.lock"),
    Path("deploy/postgres/requirements.lock"),
    Path("deploy/serving/requirements.lock"),
)
TIMEOUT_S = 300
UNREACHABLE = re.compile(r"connect|timed out|resol|retries|service|proxy|SSL", re.IGNORECASE)
"""Words in the messages of pip-audit when it cannot reach its database."""


def vulnerabilities(lock: Path) -> tuple[list[str], int]:
    """Return a line for each known vulnerability, and the number of packages that were checked.

    The number is 0 if the advisory database cannot be reached.

    Raises:
        ConfigError: pip-audit cannot read the lock file.
    """
    command = ["-m", "pip_audit", f"--requirement={lock}", "--no-deps", "--disable-pip"]
    try:
        result = subprocess.run(
            [sys.executable, *command, "--format=json", "--progress-spinner=off"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [], 0
    try:
        packages: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        messages = result.stderr.strip().splitlines() or ["pip-audit gave no reason"]
        if UNREACHABLE.search(result.stderr):
            return [], 0
        raise ConfigError(f"{lock} cannot be audited: {messages[-1]}") from None
    checked = [package for package in packages if "skip_reason" not in package]
    return [
        f"{lock}: {package['name']} {package['version']}: {vulnerability['id']}, fixed in "
        f"{', '.join(vulnerability['fix_versions']) or 'no release yet'}"
        for package in checked
        for vulnerability in package["vulns"]
    ], len(checked)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "deploy.audit",
        "List known vulnerabilities of the locked packages; exit 1 if there are any.",
    )
    parser.add_argument("locks", nargs="*", type=Path, default=LOCK_FILES, metavar="LOCK")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    lines: list[str] = []
    for lock in args.locks:
        found, num_checked = vulnerabilities(lock)
        lines += found
        if num_checked:
            print(f"{lock}: {num_checked} packages, {len(found)} known vulnerabilities")
        else:
            print(f"{lock}: not audited, because the advisory database cannot be reached")
    print("\n".join(lines), end="\n" if lines else "")
    return exit_codes.NEGATIVE if lines else exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
