"""Calibration says where the validation fold is too small for it."""

import numpy as np
import pytest

from eurosat.evaluation import calibration


def test_a_temperature_at_its_bound_is_a_warning_with_the_number_of_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.arange(40) % 4
    separable = 3.0 * np.eye(4)[labels]
    assert calibration.fit(separable, labels).temperature == pytest.approx(0.05, rel=0.01)
    [warning] = caplog.messages
    assert "bound 0.05, since 0 of the 40 validation tiles are misclassified" in warning
    assert "confidences will be too high" in warning


def test_a_temperature_within_its_bounds_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(40) % 4
    logits = 3.0 * np.eye(4)[np.where(np.arange(40) < 8, (labels + 1) % 4, labels)]
    assert 0.2 < calibration.fit(logits, labels).temperature < 5
    assert not caplog.messages
