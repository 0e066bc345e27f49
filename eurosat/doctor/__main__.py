"""Look at the environment and the platform, a line for each check and a remedy for each fault."""

import dataclasses
import json
from collections.abc import Sequence

from eurosat import cli, logs
from eurosat.doctor import bucket, machine, servers, trip
from eurosat.doctor.verdicts import Check, Finding, examine
from eurosat.doctor.visit import Visit
from eurosat.errors import ConfigError

SERVER, ACCOUNT, RUN = "tracking server", "credentials", "run and metric"
CHECKS = (
    Check("interpreter", machine.python),
    Check("lock", machine.lock),
    Check("torch", machine.torch_pair),
    Check("cores", machine.cores, needs=("torch",)),
    Check("gpu", machine.gpu, needs=("torch",)),
    Check("tiles", machine.tiles),
    Check("disk", machine.disk),
    Check("secrets", machine.secrets),
    Check(SERVER, servers.reachable),
    Check("version", servers.version, needs=(SERVER,)),
    Check(ACCOUNT, servers.credentials, needs=(SERVER,)),
    Check(RUN, trip.run, needs=(ACCOUNT,)),
    Check("artifact", trip.artifact, needs=(RUN,)),
    Check("model version", trip.model_version, needs=(RUN,)),
    Check("removal", trip.removal),
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
        "--min-free-gb", type=float, default=Visit.free_gb, metavar="GB",
        help=f"wanted on every disk that is written to ({Visit.free_gb:g})",
    )  # fmt: skip
    parser.add_argument(
        "--timeout-s", type=float, default=Visit.timeout_s, metavar="S",
        help=f"of a request to a server ({Visit.timeout_s:g})",
    )  # fmt: skip
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
    return cli.NEGATIVE if failed else cli.OK


def show(finding: Finding) -> None:
    print(f"{finding.verdict:6}  {finding.name:{WIDTH}}  {finding.said}", flush=True)
    if finding.remedy:
        print(f"{'':6}  {'':{WIDTH}}  -> {finding.remedy}", flush=True)


if __name__ == "__main__":
    cli.finish(main)
