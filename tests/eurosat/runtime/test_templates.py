"""Values in templates stay text, in pages and in Markdown."""

from types import SimpleNamespace

import pytest

from eurosat.runtime import templates
from tests.support.markup import HOSTILE_CLASS, HOSTILE_FILE, assert_page_is_inert


def test_a_page_of_gradcam_shows_names_as_text() -> None:
    result = SimpleNamespace(
        tile=HOSTILE_FILE, expected=HOSTILE_CLASS, label=HOSTILE_CLASS, confidence=0.5
    )
    rows = [{"result": result, "pngs": ["aGk="]}]
    page = templates.render("eurosat.evaluation", "gradcam.html.j2", title=HOSTILE_CLASS, rows=rows)
    assert_page_is_inert(page)
    assert "&lt;img src=x onerror=attack()&gt;" in page


def test_a_page_that_compares_versions_shows_names_as_text() -> None:
    answer = {
        "right": True,
        "version": HOSTILE_CLASS,
        "class_name": HOSTILE_CLASS,
        "confidence": HOSTILE_CLASS,
    }
    page = templates.render(
        "registry",
        "compare.html.j2",
        names=[HOSTILE_CLASS, HOSTILE_FILE],
        tiles=2,
        counts=SimpleNamespace(only_candidate=1, only_champion=1),
        difference=HOSTILE_CLASS,
        verdicts=[HOSTILE_CLASS, HOSTILE_CLASS],
        metrics=[{"name": HOSTILE_CLASS, "cells": [{"css": "better", "value": HOSTILE_CLASS}]}],
        differing=[
            {"png": "", "path": HOSTILE_FILE, "label": HOSTILE_CLASS, "answers": [answer]},
        ],
        differing_count=1,
    )
    assert_page_is_inert(page)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Sea Lake 0.98", "Sea Lake 0.98"),
        (HOSTILE_CLASS, "&lt;img src=x onerror=attack()&gt;"),
        ("a | b", r"a \| b"),
        ("![x](http://elsewhere/pixel.png)", r"!\[x\](http://elsewhere/pixel.png)"),
        ("first\n# second", "first # second"),
        (r"\[x](javascript:attack())", r"\\\[x\](javascript:attack())"),
    ],
)
def test_a_value_in_markdown_is_no_markup(value: str, expected: str) -> None:
    assert templates.markdown_text(value) == expected


def test_a_value_in_a_card_stays_in_its_cell() -> None:
    summary = templates.render(
        "registry",
        "card_summary.md.j2",
        model="maps",
        number="1",
        worst_class="![x](http://elsewhere)",
        worst_recall="0.5",
        accuracy="0.9",
        tiles=10,
        verdict="refused\n# approved",
    )
    assert r"!\[x\]" in summary
    assert "refused # approved" in summary
