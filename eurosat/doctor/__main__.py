"""Look at the environment and the platform, a line for each check and a remedy for each fault."""

import dataclasses
import json
from collections.abc import Sequence

from eurosat.doctor import bucket, host, roundtrip, servers
from eurosat.doctor.checks import Check, Finding, examine
from eurosat.doctor.context import Visit
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs

SERVER, ACCOUNT, RUN = "tracking server", "credentials", "run and metric"
CHECKS = (
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
    Check(RUN, roundtrip.run, needs=(ACCOUNT,)),
    Check("artifact", roundtrip.artifact, needs=(RUN,)),
    Check("model version", roundtrip.model_version, needs=(RUN,)),
    Check("removal", roundtrip.removal),
    Check("webhook", servers.webhook, needs=(ACCOUNT,)),
    Check("promoter", servers.promoter),
    Check("serving", servers.serving),
    Check("clock", servers.clock),
    Check("bucket", bucket.permissions),
)
WIDTH = max(len(check.name) for check in CHECKS)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.doctor", __doc__ or "")
    parser.add_argument("--json", action="store_true", help="one object at the end, and no lines")
    parser.add_argument(
        "--min-free-gb",
        type=float,
        default=Visit.free_gb,
        metavar="GB",
        help=f"wanted on every disk that is written to ({Visit.free_gb:g})",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=Visit.timeout_s,
        metavar="S",
        help=f"of a request to a server ({Visit.timeout_s:g})",
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if not args.timeout_s > 0:
        raise ConfigError(f"--timeout-s must be above 0; got {args.timeout_s:g}")
    with Visit(free_gb=args.min_free_gb, timeout_s=args.timeout_s) as visit:
        found = examine(CHECKS, visit, (lambda finding: None) if args.json else show)
    failed = [one.name for one in found if one.verdict == "failed"]
    if args.json:
        checks = [dataclasses.asdict(one) for one in found]
        print(json.dumps({"ok": not failed, "checks": checks}, indent=1))
    else:
        print(f"{len(failed)} of {len(found)} checks failed" if failed else "nothing failed")
    return exit_codes.NEGATIVE if failed else exit_codes.OK


def show(finding: Finding) -> None:
    print(f"{finding.verdict:6}  {finding.name:{WIDTH}}  {finding.said}", flush=True)
    if finding.remedy:
        print(f"{'':6}  {'':{WIDTH}}  -> {finding.remedy}", flush=True)


if __name__ == "__main__":
    cli.run_command(main)
