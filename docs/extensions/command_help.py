"""A directive that prints `--help` of every command, run while the pages are built."""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("eurosat", "expectations", "experiments", "registry", "serving", "deploy")
SUBCOMMANDS = re.compile(r"\{([\w,-]+)\}\s+\.\.\.")
"""How argparse writes the subcommands of a parser in its usage."""
COLUMNS = "76"


class HelpError(Exception):
    """`--help` of a command failed."""


def commands(folder: str) -> list[str]:
    """Return the modules of a folder that run as commands, such as ``eurosat.train``."""
    files = sorted((ROOT / folder).rglob("*.py"))
    names = [file.relative_to(ROOT).with_suffix("") for file in files if _is_command(file)]
    return [".".join(name.parts).removesuffix(".__main__") for name in names]


def _is_command(file: Path) -> bool:
    return re.search(r"^    cli\.run_command\(main", file.read_text(), re.MULTILINE) is not None


def help_pages(command: str) -> dict[str, str]:
    """Return the help of a command and of each of its subcommands, by the words that call it.

    Raises:
        HelpError: the command does not exit with 0.
    """
    pages = {command: run_help(command)}
    if subcommands := SUBCOMMANDS.search(pages[command]):
        for name in subcommands[1].split(","):
            pages[f"{command} {name}"] = run_help(command, name)
    return pages


def run_help(*words: str) -> str:
    """Run ``python -m WORDS --help`` in an empty folder, and return what it prints.

    Raises:
        HelpError: the command does not exit with 0.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "COLUMNS": COLUMNS, "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:  # no settings of a platform beside it
        process = subprocess.run(
            [sys.executable, "-m", *words, "--help"],
            cwd=folder,
            env=os.environ | settings,
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise HelpError(f"python -m {' '.join(words)} --help failed: {process.stderr[-500:]}")
    return process.stdout.strip()


class CommandHelp(SphinxDirective):
    """``{command-help} FOLDER``: a section for each command of a folder of the repository."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        folder = self.arguments[0]
        if folder not in FOLDERS:
            raise self.error(f"no folder of commands {folder!r}: choose one of {FOLDERS}")
        names = commands(folder)
        self.env.note_reread()  # the help changes with the code, not with this page
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sections = pool.map(self._section, names, pool.map(help_pages, names))
            return list(sections)

    def _section(self, command: str, pages: dict[str, str]) -> nodes.Node:
        section = nodes.section(ids=[nodes.make_id(command)], names=[command])
        section += nodes.title(command, "", nodes.literal(command, command))
        for text in pages.values():
            block = nodes.literal_block(text, text)
            block["language"] = "text"
            section += block
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
