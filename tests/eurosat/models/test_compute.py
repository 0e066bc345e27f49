"""The precision and memory layout of a training."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eurosat.models.compute import choose_compute, choose_once
from eurosat.runtime import progress
from tests.support.networks import build as build_network


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
@pytest.mark.parametrize(("precision", "bf16"), [("fp32", False), ("bf16", True)])
def test_a_configured_precision_is_used(precision: str, bf16: bool) -> None:
    compute = choose_compute(build_network().spec, precision)
    assert (compute.device, compute.bf16) == ("cpu", bf16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
def test_the_probe_runs_once_per_process(caplog: pytest.LogCaptureFixture) -> None:
    spec = dataclasses.replace(build_network().spec, drop_rate=0.123)
    with caplog.at_level("INFO"):
        assert choose_compute(spec, "auto") == choose_compute(spec, "auto")
    assert caplog.text.count("images/s probed: fp32 NCHW") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
def test_a_slow_probe_shows_its_progress(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0)
    with caplog.at_level("INFO"):
        choose_compute(dataclasses.replace(build_network().spec, drop_rate=0.321), "fp32")
    assert "choosing the precision: 1 of 6 steps" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used without a probe")
def test_the_workers_of_a_study_share_one_choice(tmp_path: Path) -> None:
    spec, file = build_network().spec, tmp_path / "compute" / "study.json"
    first = choose_once(spec, "auto", file, probe=False)
    (key, stored), *_ = json.loads(file.read_text()).items()
    assert stored == dataclasses.asdict(first)
    other = dataclasses.replace(first, channels_last=not first.channels_last)
    file.write_text(json.dumps({key: dataclasses.asdict(other)}))
    assert choose_once(spec, "auto", file, probe=False) == other, "the second worker reads it"
    assert choose_once(spec, "fp32", file, probe=False).bf16 is False, "another question"
    file.write_text("{")
    assert choose_once(spec, "auto", file, probe=False) == first, "a damaged file is replaced"
    assert json.loads(file.read_text()).keys() == {key}
