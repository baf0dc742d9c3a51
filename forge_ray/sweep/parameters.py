"""What a search space consists of: named values, their ranges, and when they exist.

Every parameter speaks four languages that agree on its values: Optuna's, a position in [0, 1), a
grid, and membership. It knows no file format and no configuration; see `space`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forge_ray.errors import ConfigError

Value = Any
"""A JSON value: scalar, list or mapping."""


class Suggester(Protocol):
    """The part of an Optuna trial that a space uses."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """An integer of the inclusive range."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of the inclusive range."""


@dataclass(frozen=True, kw_only=True)
class Parameter(ABC):
    """One searched configuration value.

    Attributes:
        name: Dotted name inside the trial's configuration.
        when: Values that earlier parameters must have for this one to exist.
        variant: Tells parameters of one name apart, of which at most one is active: the kinds of
            the components they belong to, e.g. `rq_vae`.
    """

    name: str
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """Name that no other parameter has; Optuna's, which refuses one name with two ranges."""
        return f"{self.name}[{self.variant}]" if self.variant else self.name

    def is_active(self, point: Mapping[str, Value]) -> bool:
        """Whether the parameters decided so far call for this one."""
        return all(
            name in point and any(same(point[name], value) for value in values)
            for name, values in self.when.items()
        )

    @abstractmethod
    def suggest(self, trial: Suggester, point: Mapping[str, Value]) -> Value:
        """The value an Optuna trial proposes, given the parameters decided so far."""

    @abstractmethod
    def optuna_values(self, value: Value, point: Mapping[str, Value]) -> dict[str, Any]:
        """The Optuna parameters that make `suggest` give this value."""

    @abstractmethod
    def at(self, unit: float, point: Mapping[str, Value]) -> Value:
        """The value at a position of [0, 1): equal shares for choices, linear or log for ranges."""

    @abstractmethod
    def grid(self, point: Mapping[str, Value]) -> list[Value]:
        """All values of a grid search, in a fixed order.

        Raises:
            ConfigError: A range of real numbers without `num`.
        """

    @abstractmethod
    def contains(self, value: Value, point: Mapping[str, Value]) -> bool:
        """Whether the space can produce this value."""


@dataclass(frozen=True, kw_only=True)
class Choice(Parameter):
    """One of a few values."""

    values: tuple[Value, ...]

    def suggest(self, trial: Suggester, point: Mapping[str, Value]) -> Value:
        """See `Parameter`; lists and mappings go through Optuna as JSON text."""
        labels = [label(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(self.label, labels))]

    def optuna_values(self, value: Value, point: Mapping[str, Value]) -> dict[str, Any]:
        """See `Parameter`."""
        return {self.label: label(value)}

    def at(self, unit: float, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]

    def grid(self, point: Mapping[str, Value]) -> list[Value]:
        """See `Parameter`."""
        return list(self.values)

    def contains(self, value: Value, point: Mapping[str, Value]) -> bool:
        """See `Parameter`."""
        return any(same(value, one) for one in self.values)


@dataclass(frozen=True, kw_only=True)
class IntRange(Parameter):
    """An integer between two inclusive ends."""

    low: int
    high: int
    step: int = 1

    def suggest(self, trial: Suggester, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        return trial.suggest_int(self.label, self.low, self.high, step=self.step)

    def optuna_values(self, value: Value, point: Mapping[str, Value]) -> dict[str, Any]:
        """See `Parameter`."""
        return {self.label: value}

    def at(self, unit: float, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        values = self.grid(point)
        return values[min(int(unit * len(values)), len(values) - 1)]

    def grid(self, point: Mapping[str, Value]) -> list[Value]:
        """See `Parameter`."""
        return list(range(self.low, self.high + 1, self.step))

    def contains(self, value: Value, point: Mapping[str, Value]) -> bool:
        """See `Parameter`."""
        return not isinstance(value, bool) and value in self.grid(point)


@dataclass(frozen=True, kw_only=True)
class FloatRange(Parameter):
    """A real number between two inclusive ends, on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool = False
    num: int | None = None

    def suggest(self, trial: Suggester, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        return trial.suggest_float(self.label, self.low, self.high, log=self.log)

    def optuna_values(self, value: Value, point: Mapping[str, Value]) -> dict[str, Any]:
        """See `Parameter`."""
        return {self.label: value}

    def at(self, unit: float, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        if self.log:
            value = math.exp(math.log(self.low) + unit * math.log(self.high / self.low))
        else:
            value = self.low + unit * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def grid(self, point: Mapping[str, Value]) -> list[Value]:
        """See `Parameter`."""
        if self.num is None:
            raise ConfigError(
                f"space.{self.name}.num must be set for a grid, got none. "
                "Set the number of grid points, or use another sampler."
            )
        return [self.at(index / max(self.num - 1, 1), point) for index in range(self.num)]

    def contains(self, value: Value, point: Mapping[str, Value]) -> bool:
        """See `Parameter`."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Schedule(Parameter):
    """Codebook sizes by level: K_l = first * ratio^(l - 1), rounded, at least `min_size`.

    Optuna searches `first` and `ratio`; everything else sees the distinct lists that they make.
    """

    levels: str
    """Name of the parameter above that holds the number of levels."""
    first: tuple[int, ...]
    ratio: tuple[float, ...]
    min_size: int

    def suggest(self, trial: Suggester, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        first = trial.suggest_categorical(f"{self.label}.first", list(self.first))
        ratio = trial.suggest_categorical(f"{self.label}.ratio", list(self.ratio))
        return self._sizes(first, ratio, point[self.levels])

    def optuna_values(self, value: Value, point: Mapping[str, Value]) -> dict[str, Any]:
        """See `Parameter`; the first pair that gives these sizes, where several do."""
        for first, ratio in self._pairs():
            if self._sizes(first, ratio, point[self.levels]) == list(value):
                return {f"{self.label}.first": first, f"{self.label}.ratio": ratio}
        raise KeyError(f"{self.name} cannot be {value}")

    def at(self, unit: float, point: Mapping[str, Value]) -> Value:
        """See `Parameter`."""
        values = self.grid(point)
        return values[min(int(unit * len(values)), len(values) - 1)]

    def grid(self, point: Mapping[str, Value]) -> list[Value]:
        """See `Parameter`."""
        lists = [self._sizes(*pair, point[self.levels]) for pair in self._pairs()]
        return [one for index, one in enumerate(lists) if one not in lists[:index]]

    def contains(self, value: Value, point: Mapping[str, Value]) -> bool:
        """See `Parameter`."""
        return value in self.grid(point)

    def _pairs(self) -> Iterator[tuple[int, float]]:
        return ((first, ratio) for first in self.first for ratio in self.ratio)

    def _sizes(self, first: int, ratio: float, levels: int) -> list[int]:
        return [max(self.min_size, round(first * ratio**level)) for level in range(levels)]


def label(value: Value) -> Any:
    """A value as Optuna stores it: lists and mappings as JSON text."""
    is_scalar = value is None or isinstance(value, (bool, int, float, str))
    return value if is_scalar else json.dumps(value)


def same(first: Value, second: Value) -> bool:
    """Whether two values are one choice: `True == 1` in Python, yet they are two."""
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)
