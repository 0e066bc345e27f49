"""Evaluate a run or a registered version; print the report and store it in the run."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eurosat import tracking
from eurosat.data.split import FOLDS
from eurosat.runtime import cli, exit_codes, logs

CORRUPTED_TILES = 1000
"""Tiles of the fold that are corrupted; each is classified 40 times, by kind and severity."""


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.evaluate", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help="run id, runs:/ID or models:/eurosat@champion")
    parser.add_argument("--fold", choices=FOLDS, default="test", help="fold of the run's own data")
    parser.add_argument(
        "--data", help="use other data, such as synthetic or 'folder data.root=DIR'"
    )
    parser.add_argument("--against", metavar="OTHER", help="also compare with this run or version")
    parser.add_argument(
        "--corruptions", action="store_true", help="also try haze, blur, noise, ..."
    )
    parser.add_argument(
        "--corruption-tiles",
        type=int,
        default=CORRUPTED_TILES,
        metavar="N",
        help=f"number of tiles to corrupt (default: {CORRUPTED_TILES})",
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from eurosat.evaluation import report
    from eurosat.evaluation.results import compare, evaluate, evaluate_corrupted

    result = evaluate(tracking.resolve_run(args.run), args.fold, args.data)
    summary = report.summarise(result)
    if args.data:
        summary["data"] = args.data
    if args.against:
        other = evaluate(tracking.resolve_run(args.against), args.fold, args.data)
        summary["against"] = compare(result, other)
    if args.corruptions:
        summary["corruptions"] = evaluate_corrupted(result, args.corruption_tiles)
    text = report.render_markdown(summary)
    artifact_path = f"evaluation/{result.fold}"
    if args.data:
        artifact_path += "-" + re.sub(r"[^\w.]+", "-", args.data).strip("-")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "report.json").write_text(json.dumps(summary, indent=1))
        (folder / "report.md").write_text(text)
        report.draw_plots(result, summary, folder)
        with tracking.append_to(result.run_id) as run:
            run.log_folder(folder, artifact_path)
    print(text)
    print(f"stored in run {result.run_id}: {artifact_path}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
