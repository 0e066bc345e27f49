"""Calibration says where the validation fold is too small for it."""

import numpy as np
import pytest

from eurosat.evaluation import calibration


def test_a_validation_fold_without_an_error_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.arange(40) % 4
    assert calibration.fit(3.0 * np.eye(4)[labels], labels).temperature < 0.1
    [warning] = caplog.messages
    assert warning.startswith("confidences will be too high (temperature 0.0")
    assert "0 of 40 validation tiles are misclassified" in warning


def test_a_temperature_that_errors_determine_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.arange(40) % 4
    logits = 3.0 * np.eye(4)[np.where(np.arange(40) < 8, (labels + 1) % 4, labels)]
    assert 0.2 < calibration.fit(logits, labels).temperature < 5
    assert not caplog.messages


def test_a_network_that_guesses_gets_a_warning_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.arange(400) % 4
    logits = 3.0 * np.eye(4)[np.arange(400) // 4 % 4]  # right for a quarter of the tiles
    assert calibration.fit(logits, labels).temperature > 19
    [warning] = caplog.messages
    assert "300 of 400 validation tiles are misclassified, so confidences mean little" in warning
