"""The demo's own decisions; tests/e2e runs the whole of it."""

import pytest

from eurosat import tracking
from eurosat.config import compose
from experiments import demo
from experiments.sweep import run_name

pytestmark = pytest.mark.usefixtures("tracking_store")


def test_a_demo_after_a_killed_one_says_that_it_begins_anew_and_how_to_continue_instead() -> None:
    config = compose(["recipe=demo"])
    assert demo.unfinished_sweep(config) is None, "there is no sweep yet"
    tags = {"kind": "sweep", "study": "sweep-7"}
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.run(config.experiment, run_name(config), tags=tags, system_metrics=False) as run,
    ):
        run.log_params(config.as_dict())
        raise KeyboardInterrupt
    message = demo.unfinished_sweep(config)
    assert message is not None
    assert "recipe=demo did not finish: this demo begins anew" in message
    assert "`python -m experiments.sweep resume=sweep-7`" in message
    assert demo.unfinished_sweep(compose(["recipe=resnet18"])) is None


def test_the_last_lines_of_the_demo_lead_to_the_runs_and_to_the_champion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo.print_next_steps(compose(), demo.DemoConfig(model="tiles"))
    ui, runs, serve = capsys.readouterr().out.splitlines()
    assert "mlflow ui" in ui
    assert "http://127.0.0.1:5000/#/experiments/" in runs
    assert serve.endswith("python -m serving.server --model models:/tiles@champion")
