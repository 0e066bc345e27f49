"""Write the README's tables from the committed reports: `python -m benchmarks.tables`."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REPORTS = ROOT / "reports"


def main_job(report: dict[str, Any]) -> str:
    """The champion of one main job on the real tiles."""
    rows = {
        "data": f"EuroSAT RGB, {report['split']} split, seed {report['seed']}",
        "recipe": f"`{report['recipe']}`, {report['epochs']} epochs from scratch",
        "test accuracy": f"**{report['test_accuracy']:.4f}**",
        "with the eight flips and turns averaged": f"{report['test_tta_accuracy']:.4f}",
        "macro F1": f"{report['macro_f1']:.4f}",
        "macro AUPRC": f"{report['macro_auprc']:.4f}",
        "time, from the first tile to the last answer": f"{report['seconds'] / 60:.0f} min",
        "of which training the champion": f"{report['train_seconds'] / 60:.0f} min",
        "hardware": f"{report['hardware']}, {report['precision']}",
    }
    lines = ["| `make main-job` | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


TABLES = {"main-job": main_job}
"""Each report with a table, and how it is drawn."""


def rewritten(readme: str) -> str:
    """The README with every table drawn anew between its markers."""
    for name, draw in TABLES.items():
        table = draw(json.loads((REPORTS / f"{name}.json").read_text()))
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            sys.exit(f"error: README.md has no place {begin} ... {end}")
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
