"""Check the environment and the platform: a line for each check, a remedy for each fault."""

import dataclasses
import json
from collections.abc import Sequence

from eurosat.doctor import bucket, host, servers
from eurosat.doctor.checks import Check, run_checks
from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Finding
from eurosat.doctor.roundtrip import RoundTrip
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

SERVER, ACCOUNT, RUN = "tracking server", "credentials", "run and metric"


def all_checks() -> tuple[Check, ...]:
    """Return the checks in the order in which they run."""
    roundtrip = RoundTrip()
    return (
        Check("interpreter", host.python),
        Check("lock", host.lock),
        Check("torch", host.torch_pair),
        Check("cores", host.cores, needs=("torch",)),
        Check("gpu", host.gpu, needs=("torch",)),
        Check("tiles", host.tiles),
        Check("disk", host.disk),
        Check("secrets", host.secrets),
        Check(SERVER, servers.reachable),
        Check("version", servers.version, needs=(SERVER,)),
        Check(ACCOUNT, servers.credentials, needs=(SERVER,)),
        Check(RUN, roundtrip.check_run, needs=(ACCOUNT,)),
        Check("artifact", roundtrip.check_artifact, needs=(RUN,)),
        Check("model version", roundtrip.check_model_version, needs=(RUN,)),
        Check("removal", roundtrip.check_removal),
        Check("webhook", servers.webhook, needs=(ACCOUNT,)),
        Check("promoter", servers.promoter),
        Check("serving", servers.serving),
        Check("clock", servers.clock),
        Check("bucket", bucket.permissions),
    )


NAMES = [check.name for check in all_checks()]
NAME_WIDTH = max(map(len, NAMES))


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.doctor", __doc__ or "")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of lines"
    )
    parser.add_argument(
        "--min-free-gb",
        type=float,
        default=DoctorContext.min_free_gb,
        metavar="GB",
        help="free space required on every disk that is written to (%(default)g)",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DoctorContext.timeout_s,
        metavar="S",
        help="time limit of one request to a server (%(default)g)",
    )
    parser.add_argument(
        "--only", choices=NAMES, metavar="CHECK", help="run this check and those that it needs"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if not args.timeout_s > 0:
        raise ConfigError(f"--timeout-s must be above 0; got {args.timeout_s:g}")
    with DoctorContext(min_free_gb=args.min_free_gb, timeout_s=args.timeout_s) as context:
        report = (lambda finding: None) if args.json else print_finding
        findings = run_checks(_with_needs(args.only), context, report)
    num_failed = sum(finding.verdict == "failed" for finding in findings)
    if args.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": not num_failed, "checks": checks}, indent=1))
    elif num_failed:
        print(f"{num_failed} of {len(findings)} checks failed")
    else:
        print("no check failed")
    return exit_codes.NEGATIVE if num_failed else exit_codes.OK


def _with_needs(name: str | None) -> tuple[Check, ...]:
    """Return the check of this name and those that it needs, or all."""
    checks = {check.name: check for check in all_checks()}
    if name is None:
        return tuple(checks.values())
    names = {name}
    for check in reversed(checks.values()):  # a check needs only earlier ones
        names |= {*check.needs} if check.name in names else set()
    return tuple(check for check in checks.values() if check.name in names)


def print_finding(finding: Finding) -> None:
    print(f"{finding.verdict:6}  {finding.name:{NAME_WIDTH}}  {finding.message}", flush=True)
    if finding.remedy:
        print(f"{'':6}  {'':{NAME_WIDTH}}  -> {finding.remedy}", flush=True)


if __name__ == "__main__":
    cli.run_command(main)
