"""Judge a trained run or a registered version: figures with error bars, told and kept."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eurosat import tracking
from eurosat.data.split import FOLDS
from eurosat.runtime import cli, exit_codes, logs

CORRUPTED_TILES = 1000
"""Tiles of the fold that the corruptions are tried on: 40 passes over them."""


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.evaluate", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help="run id, runs:/ID or models:/eurosat@champion")
    parser.add_argument("--fold", choices=FOLDS, default="test")
    parser.add_argument("--data", help="other tiles: synthetic, or 'folder data.root=DIR'")
    parser.add_argument("--against", metavar="OTHER", help="a run or version to compare with")
    parser.add_argument("--corruptions", action="store_true", help="haze, blur, noise and others")
    parser.add_argument("--corruption-tiles", type=int, default=CORRUPTED_TILES, metavar="N")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from eurosat.evaluation import report
    from eurosat.evaluation.results import compare, evaluate, evaluate_corrupted

    judged = evaluate(tracking.resolve_run(args.run), args.fold, args.data)
    told = report.summarise(judged)
    if args.data:
        told["data"] = args.data
    if args.against:
        other = evaluate(tracking.resolve_run(args.against), args.fold, args.data)
        told["against"] = compare(judged, other)
    if args.corruptions:
        told["corruptions"] = evaluate_corrupted(judged, args.corruption_tiles)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "figures.json").write_text(json.dumps(told, indent=1))
        (folder / "report.md").write_text(report.render_markdown(told))
        report.draw_plots(judged, told, folder)
        kept = f"evaluation/{judged.fold}"
        if args.data:
            kept += "-" + re.sub(r"[^\w.]+", "-", args.data).strip("-")
        with tracking.append_to(judged.run_id) as run:
            run.log_folder(folder, kept)
    print(report.render_markdown(told))
    print(f"in run {judged.run_id}: {kept}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
