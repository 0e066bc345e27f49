"""Two versions side by side on one HTML page, with the tiles on which they differ."""

import base64
import html
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat.errors import ConfigError, EuroSATError, ModelError
from eurosat.runtime import cli, exit_codes, logs
from registry import evidence, gates, versions
from registry.gates import Paired

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

MOST_TILES = 120
"""That are shown; the page says how many there are."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.better { color: #116329; font-weight: 600 } .worse { color: #a40e26; font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
figure { margin: 0 } img { width: 100%; image-rendering: pixelated }
figcaption { font-size: 12px; overflow-wrap: anywhere }
"""
LESS_IS_BETTER = ("nll", "brier", "ece")


def page(one: "ModelVersion", other: "ModelVersion") -> str:
    """The page.

    Raises:
        TrackingError: a run or its predictions cannot be read.
        ModelError: they were tested on no tile in common.
    """
    names = [html.escape(f"{version.name} {version.version}") for version in (one, other)]
    both = [evidence.read(versions.run_of(version)) for version in (one, other)]
    mine, yours = evidence.in_common(both[0], both[1])
    if mine.frame.empty:
        raise ModelError(f"{names[0]} and {names[1]} were tested on no tile in common")
    figures = [evidence.figures(predictions) for predictions in (mine, yours)]
    title = f"{names[0]} and {names[1]}"
    rows = [
        f"<tr><th>{html.escape(name)}</th>{_cells(name, figures)}</tr>"
        for name in figures[0]
        if name in figures[1]
    ]
    verdicts = [html.escape(v.tags.get(versions.VERDICT, "not judged yet")) for v in (one, other)]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
<p>On the {len(mine.frame):,} test tiles that both were tested on. {_chance(mine, yours)}</p>
<table><tr><th></th><th>{names[0]}</th><th>{names[1]}</th></tr>
<tr><th>verdict</th><td>{verdicts[0]}</td><td>{verdicts[1]}</td></tr>
{"".join(rows)}</table>
{_tiles(one, mine, yours, names)}</html>
"""


def _cells(name: str, figures: Sequence[dict[str, float]]) -> str:
    a, b = (values[name] for values in figures)
    sign = -1 if name in LESS_IS_BETTER else 1
    marks = (
        ("", "") if a == b else ("better", "worse") if sign * a > sign * b else ("worse", "better")
    )
    return "".join(
        f'<td class="n {mark}">{value:.4f}</td>' for value, mark in zip((a, b), marks, strict=True)
    )


def _right(predictions: evidence.Predictions) -> "pd.DataFrame":
    """Per tile what was answered, how surely, and whether it is right."""
    frame = predictions.frame
    columns = [evidence.PREFIX + name for name in predictions.classes]
    probabilities = frame[columns].to_numpy()
    told = frame[["sha256", "label"]].copy()
    told["tile"] = frame["tile"] if "tile" in frame else frame["sha256"]
    told["said"] = [predictions.classes[k] for k in probabilities.argmax(axis=1)]
    told["confidence"] = probabilities.max(axis=1)
    told["right"] = told["said"] == told["label"]
    return told


def _chance(mine: evidence.Predictions, yours: evidence.Predictions) -> str:
    one, other = _right(mine)["right"], _right(yours)["right"]
    paired = Paired(
        tiles=len(one),
        only_candidate=int((one & ~other).sum()),
        only_champion=int((other & ~one).sum()),
    )
    found = gates.judge_difference(paired, gates.Difference())
    return (
        f"The first alone has {paired.only_candidate} right, the second alone "
        f"{paired.only_champion}: accuracy differs by {html.escape(found.value)} (95 % interval, "
        "exact McNemar test)."
    )


def _tiles(
    one: "ModelVersion",
    mine: evidence.Predictions,
    yours: evidence.Predictions,
    names: Sequence[str],
) -> str:
    a, b = _right(mine), _right(yours)
    differ = (a["said"] != b["said"]).to_numpy()
    count = int(differ.sum())
    if not count:
        return "<p>They answer every one of these tiles alike.</p>"
    pictures = _pictures(versions.run_of(one), list(a["sha256"][differ][:MOST_TILES]))
    shown = []
    for first, second in zip(
        a[differ][:MOST_TILES].itertuples(), b[differ][:MOST_TILES].itertuples(), strict=True
    ):
        said = "".join(
            f'<br><span class="{"better" if row.right else "worse"}">{name}: '
            f"{html.escape(str(row.said))} {row.confidence:.2f}</span>"
            for name, row in zip(names, (first, second), strict=True)
        )
        shown.append(
            f"<figure>{pictures.get(str(first.sha256), '')}<figcaption>"
            f"{html.escape(str(first.tile))}<br>{html.escape(str(first.label))}{said}"
            "</figcaption></figure>"
        )
    more = f", of which {MOST_TILES} are shown" if count > MOST_TILES else ""
    head = f"<h2>{count:,} tiles on which they differ{more}</h2>"
    return f'{head}<div class="tiles">{"".join(shown)}</div>'


def _pictures(run_id: str, tiles: Sequence[str]) -> dict[str, str]:
    """An image element by the tile's sha256; none where this machine lacks the data."""
    from PIL import Image

    from eurosat.data import bands
    from eurosat.evaluation.recorded import recorded_fold

    try:
        pack, rows = recorded_fold(run_id, "test")
    except EuroSATError as error:
        log.warning("the page shows no pictures: %s", error)
        return {}
    row_of = {str(pack.table["sha256"].iloc[row]): int(row) for row in rows}
    told = {}
    for sha256 in tiles:
        if (row := row_of.get(sha256)) is None:
            continue
        pixels = pack.tiles_NHWC[row]
        file = io.BytesIO()
        Image.fromarray(
            pixels if pack.bands == len("RGB") else pixels[..., bands.rgb_indices()]
        ).save(file, "PNG")
        told[sha256] = (
            f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
        )
    return told


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.compare", __doc__ or "")
    parser.add_argument("versions", nargs=2, metavar="VERSION")
    parser.add_argument("--out", type=Path, default=Path("compared.html"), metavar="FILE")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    one, other = (versions.named(args.model, number) for number in args.versions)
    told = page(one, other)
    try:
        args.out.write_text(told, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {args.out}: {error.strerror}") from error
    print(f"written to {args.out}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
