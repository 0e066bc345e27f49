"""Tables on a terminal, in a pipe and in a log."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CELLS = ("serving.vs_best_peer", "version 12", "a" * 150, "2026-11-30T20:31:19")
PROGRAM = f"""
from rich.table import Table
from eurosat.runtime import tables
table = Table("name", "of", "reason", "time", title="a title")
for column in table.columns[:2]:
    column.no_wrap = True
table.add_row(*{CELLS!r})
tables.print_table(table)
"""
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
PRINTED_BY = re.compile(r"\bConsole\((?!stderr=True)")


def test_a_table_in_a_pipe_has_each_row_on_one_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for columns in ({}, {"COLUMNS": "40"}):
        printed = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=environment | columns,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (row,) = (line for line in printed.splitlines() if CELLS[0] in line)
        assert all(cell in row for cell in CELLS)


@pytest.mark.parametrize("columns", ["80", "40"])
def test_a_table_on_a_terminal_has_its_width_and_all_its_characters(columns: str) -> None:
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": columns, "TERM": "xterm"},
        stdout=terminal,
    )
    os.close(terminal)
    chunks: list[bytes] = []
    try:
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    except OSError:  # Linux: the terminal's last writer has closed it
        pass
    finally:
        os.close(reader)
    assert process.wait(timeout=30) == 0
    lines = ESCAPES.sub("", b"".join(chunks).decode()).splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert "…" not in "".join(lines)
    rows = [re.split("[│┃]", line)[1:-1] for line in lines if line.startswith("│")]
    cells = ["".join(part.strip() for part in column) for column in zip(*rows, strict=True)]
    assert [cell.replace(" ", "") for cell in cells] == [cell.replace(" ", "") for cell in CELLS]


def test_every_table_is_printed_in_this_way() -> None:
    folders = ("eurosat", "experiments", "registry", "serving", "expectations", "deploy")
    sources = {
        path.relative_to(ROOT): path.read_text()
        for folder in (*folders, "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    with_tables = {path: text for path, text in sources.items() if re.search(r"\bTable\(", text)}
    assert Path("registry/verdict.py") in with_tables
    for path, text in with_tables.items():
        assert "tables.print_table(" in text, (
            f"{path} makes a table: print it by tables.print_table"
        )
        assert not PRINTED_BY.search(text), f"{path} prints past eurosat.runtime.tables"
