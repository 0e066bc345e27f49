"""Each alert has a section in the runbook, and none is critical on a fresh installation."""

import re
from typing import Any

import yaml

from tests.support.paths import ROOT

RULES = ROOT / "deploy/prometheus/rules.yml"
RUNBOOK = ROOT / "docs/runbook.md"
PARTS = ("**Meaning:**", "**First look:**", "**Remedy:**", "**Silence:**")


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_each_alert_names_its_section_of_the_runbook_and_there_is_no_other() -> None:
    _, *sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)
    by_name = {section.partition("\n")[0]: section for section in sections}
    assert by_name.keys() == alerts().keys()
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert [part for part in PARTS if part not in by_name[name]] == [], name


def test_a_fresh_installation_is_not_critical() -> None:
    """Serving is up and has no champion, and had none before."""
    assert alerts()["NoChampion"]["labels"]["severity"] == "warning"
    assert alerts()["NoChampion"]["for"] == "30m"
    assert "max_over_time(sum(eurosat_model)[1d:1m]) > 0" in alerts()["ChampionLost"]["expr"]


def test_faults_of_the_server_and_rejections_are_different_alerts() -> None:
    statuses = {
        name: re.findall(r'status=~?"([\d|.]+)"', rule["expr"]) for name, rule in alerts().items()
    }
    assert statuses["InternalErrors"] == ["500"]
    assert statuses["RequestsRejected"] == ["429|503"]
