"""docs/tutorial.md, block by block: what it says is printed is printed."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.markdown import DOCS, CodeBlock, blocks
from tests.support.paths import ROOT
from tests.support.registry import MLFLOW_WARNS
from tests.support.serving import running

pytestmark = MLFLOW_WARNS

BLOCKS = blocks(DOCS / "tutorial.md")
DEFAULT_URL = "http://127.0.0.1:5001"
SERVES = "serving.server"
SMALLER = {
    "data.synthetic.tiles=600": "data.synthetic.tiles=600 data.synthetic.size=32",
    "recipe=efficientnet-lite0-quick": "recipe=efficientnet-lite0-quick weights=none "
    "model.name=test_resnet model.input_size=null model.tta_views=1 model.drop_rate=0 "
    "optim.lr=4e-3 optim.batch_size=8 optim.ema=0.9 trainer.epochs=8 trainer.precision=fp32 "
    "trainer.threads=1",
    # the code that is tested need not be committed
    "registry.promote": "registry.promote --accept-uncommitted --gates low.toml",
}
"""Replacements with which the training takes seconds."""


@pytest.fixture(scope="module", autouse=True)
def folder(store: Path) -> Path:
    """The folder of a store, with the gates of ``low.toml``: a short training passes them."""
    gates = (ROOT / "registry" / "gates.toml").read_text()
    gates = re.sub("^floor = .*", "floor = 0.1", gates, flags=re.MULTILINE)
    (store / "low.toml").write_text(gates.replace("ceiling = 0.08", "ceiling = 0.9"))
    return store


def run(block: CodeBlock, folder: Path, url: str) -> str:
    """Run a block in the shell of those before it, and return what it prints."""
    text = block.text.replace(DEFAULT_URL, url).replace("--wait", f"--url {url} --wait")
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    variables = folder / "variables.sh"
    variables.touch()
    script = f"set -euo pipefail\nsource {variables}\n{text}\nexport -p > {variables}\n"
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-c", script]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    process = subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, f"{text}\n{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    return process.stdout


def steps() -> Iterator[tuple[CodeBlock, str]]:
    """Yield each block that is run, with what the page says it prints."""
    for block, following in zip(BLOCKS, [*BLOCKS[1:], CodeBlock("", "")], strict=True):
        if block.language in ("sh", "python") and "make setup" not in block.text:
            yield block, following.text if following.language == "text" else ""


def assert_printed(expected: str, printed: str) -> None:
    """Compare line by line; … in the page stands for any text."""
    pattern = "\n".join(
        ".*" + ".*".join(map(re.escape, line.split("…"))) + ".*" for line in expected.splitlines()
    )
    assert re.search(pattern, printed), f"expected:\n{expected}\nprinted:\n{printed}"


def test_each_block_of_the_tutorial_prints_what_the_page_says(folder: Path) -> None:
    url = DEFAULT_URL
    with contextlib.ExitStack() as stack:
        for block, expected in steps():
            if SERVES in block.text:  # in a second terminal
                flags = block.text.split(SERVES)[1].split()
                url = stack.enter_context(running(folder, *flags)).url
            else:
                assert_printed(expected, run(block, folder, url))


def test_the_tutorial_ends_with_predictions_of_a_server() -> None:
    texts = [block.text for block, _ in steps()]
    assert len(texts) > 8
    (served,) = (number for number, text in enumerate(texts) if SERVES in text)
    assert any("serving.client" in text for text in texts[served:])
    assert any(DEFAULT_URL in text for text in texts[served:])
