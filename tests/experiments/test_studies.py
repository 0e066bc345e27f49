"""Studies in their database."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from eurosat.errors import ConfigError
from experiments import studies
from tests.support.mlflow_server import free_port
from tests.support.sweeps import make_study, wait_until


def test_the_password_of_the_storage_is_not_in_error_messages() -> None:
    url = "postgresql+psycopg2://team:secret@127.0.0.1:1/studies"
    with pytest.raises(ConfigError) as caught:
        studies.open_storage(url)
    assert "team:***@" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_dashboard_of_make_sweep_ui_shows_the_study(tmp_path: Path) -> None:
    make_study(tmp_path, trials=1)
    port, program = free_port(), Path(sys.executable).with_name("optuna-dashboard")

    def study_names() -> list[str]:
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"http://127.0.0.1:{port}/api/studies", timeout=10).json()
            return [summary["study_name"] for summary in answer["study_summaries"]]
        return []

    process = subprocess.Popen(
        [program, f"sqlite:///{tmp_path}/study.db", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: study_names() == ["s"], process)
    finally:
        process.terminate()
        process.communicate()
