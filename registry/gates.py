"""The gates that a candidate must pass to become champion, as gates.toml sets them.

`registry.metric_gates` and `registry.boolean_gates` apply them.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eurosat.config import from_mapping
from eurosat.errors import ConfigError

FILE = Path(__file__).with_name("gates.toml")
FILE_VARIABLE = "EUROSAT_GATES"
"""Environment variable that names a team's own file; the platform sets it (docs/platform.md)."""
BOOLEAN_GATES = {
    "data_validation": "faulty tiles make a faulty model",
    "leakage": "test tiles that were used in training overestimate the accuracy",
    "lineage": "a model that cannot be reproduced cannot be fixed",
    "committed": "code that was never committed is lost with the next change to it",
    "signature": "clients of the champion must work with its successor",
    "approval": "a person must take responsibility for the promotion",
    "retired": "a version that was taken out of service must not return",
    "files": "the served files must be the registered ones, and must not execute foreign code",
}
"""Gates that pass or fail without a limit, and why they exist. A file of gates may switch each
on or off, and nothing else."""
OFF_BY_DEFAULT = {"approval": "no person has to approve"}
"""Boolean gates that are off, and why; ``off = ""`` in a file of gates switches one on."""
EARLIER_KEYS = {"alone": "absolute_only", "wins": "must_improve"}
"""Keys in files of gates that were written for earlier versions, and their names now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A limit for one metric."""

    metric: str
    """A metric of `registry.evidence`."""
    floor: float | None = None
    """Smallest value that passes, for metrics where more is better."""
    ceiling: float | None = None
    """Largest value that passes, for metrics where less is better."""
    margin: float = 0.0
    """How much worse than the champion's a value may be."""
    absolute_only: bool = False
    """Compare with the floor or ceiling only, not with the champion."""
    must_improve: bool = False
    """At least one of the gates with this mark must be better than the champion's."""
    off: str = ""
    """Why the gate is switched off; every verdict shows it."""
    why: str
    """Why the gate exists."""
    meaning: str = ""
    """What the metric is, in plain words; added to a refusal."""
    remedy: str = ""
    """What to do about a refusal; added to its text."""

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.floor, self.ceiling) if limit is not None]
        if len(limits) != 1:
            raise ConfigError(
                f"{self.metric} has {len(limits)} limits: give it either a floor or a ceiling"
            )
        if not math.isfinite(limits[0]):
            kind = "floor" if self.ceiling is None else "ceiling"
            raise ConfigError(f"{self.metric}.{kind} must be a finite number; got {limits[0]}")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(
                f"{self.metric}.margin is the tolerated loss, 0 or more; got {self.margin}"
            )
        if self.absolute_only and self.must_improve:
            raise ConfigError(
                f"{self.metric} has both absolute_only and must_improve: drop one of them, as an "
                "absolute gate never compares with the champion"
            )
        _check_why(self.metric, self.why)

    @property
    def limit(self) -> float:
        """Return the floor or the ceiling."""
        return self.floor if self.floor is not None else float(self.ceiling or 0)

    @property
    def sign(self) -> int:
        """Return 1 if more is better, -1 if less is better."""
        return 1 if self.ceiling is None else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class DifferenceGate:
    """The test whether the candidate is worse than the champion on the common test tiles."""

    alpha: float = 0.05
    """Significance level of the exact McNemar test; the paired bootstrap interval covers
    1 - alpha."""
    tolerance: float = 0.005
    """Loss of accuracy that the interval must exclude; otherwise there are too few tiles."""
    better: bool = False
    """Require that the test calls the candidate better, not only that it does not call it worse."""
    off: str = ""
    why: str = "a small gain or loss may be due to chance"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"difference.alpha must be above 0 and below 0.5; got {self.alpha}")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"difference.tolerance must be in [0, 1); got {self.tolerance}")
        _check_why("difference", self.why)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyGate:
    """How slow a candidate may be; measured only with `registry.judge --latency`."""

    ceiling: float = 2.0
    """Largest ratio to the champion's time, at the same precision and batch size."""
    off: str = ""
    why: str = "a version that is twice as slow needs twice as many servers"

    def __post_init__(self) -> None:
        if not 0 < self.ceiling < math.inf:
            raise ConfigError(
                f"latency.ceiling is a ratio to the champion's time, above 0; got {self.ceiling}"
            )
        _check_why("latency", self.why)


@dataclass(frozen=True, kw_only=True, slots=True)
class BooleanGate:
    """A gate that passes or fails without a limit."""

    name: str
    off: str = ""
    """Why the gate is switched off; every verdict shows it."""
    why: str
    """Why the gate exists."""

    def __post_init__(self) -> None:
        _check_why(self.name, self.why)


def _default_boolean_gates() -> tuple[BooleanGate, ...]:
    return tuple(
        BooleanGate(name=name, why=why, off=OFF_BY_DEFAULT.get(name, ""))
        for name, why in BOOLEAN_GATES.items()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """All gates of a file."""

    metrics: tuple[Gate, ...]
    difference: DifferenceGate = field(default_factory=DifferenceGate)
    latency: LatencyGate = field(default_factory=LatencyGate)
    booleans: tuple[BooleanGate, ...] = field(default_factory=_default_boolean_gates)


def default_file() -> Path:
    """Return the team's file of gates if the environment names one, else ours."""
    return Path(os.environ.get(FILE_VARIABLE) or FILE)


def load(file: Path = FILE) -> Gates:
    """Read a file of gates: TOML with one table per gate.

    A table that is missing leaves `DifferenceGate`, `LatencyGate` and `BOOLEAN_GATES` as they are.

    Raises:
        ConfigError: unreadable, not TOML, no gate for a metric, an unknown key or a wrong type.
    """
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the gates in {file} cannot be read: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} must be a table, such as [accuracy]")
    metrics = tuple(
        _metric_gate(name, table)
        for name, table in tables.items()
        if name not in (*BOOLEAN_GATES, "difference", "latency")
    )
    if not metrics:
        raise ConfigError(
            f"{file} has no gate for a metric, so nothing would be judged: add a table such as "
            "[accuracy]"
        )
    booleans = tuple(
        from_mapping(BooleanGate, asdict(gate) | tables.get(gate.name, {}), gate.name)
        for gate in _default_boolean_gates()
    )
    return Gates(
        metrics=metrics,
        difference=from_mapping(DifferenceGate, tables.get("difference", {}), "difference"),
        latency=from_mapping(LatencyGate, tables.get("latency", {}), "latency"),
        booleans=booleans,
    )


def _metric_gate(name: str, table: Mapping[str, Any]) -> Gate:
    renamed = {EARLIER_KEYS.get(key, key): value for key, value in table.items()}
    return from_mapping(Gate, {"metric": name} | renamed, name)


def _check_why(name: str, why: str) -> None:
    if not why.strip():
        raise ConfigError(f"{name}.why is empty: say why this gate exists and has this limit")
