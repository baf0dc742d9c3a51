"""The search space: named parameters, their values, and the conditions under which they exist.

A point is a flat mapping from dotted configuration names to values, e.g.
`{"sid.quantizer.kind": "rq_vae", "sid.quantizer.levels": 3}`. A space makes points in three ways
that agree on what a point is: from an Optuna trial, from numbers in the unit cube (quasi-random
search), and as a grid. It knows neither the configurations that points are applied to, nor Ray.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forge_ray.errors import ConfigError

Value = Any
"""A JSON value: scalar, list or mapping."""

Point = dict[str, Value]

_KINDS = ("choice", "int", "float", "log", "value")
_OPTIONS = {"int": ("when", "step"), "float": ("when", "num"), "log": ("when", "num")}


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
    """

    name: str
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def is_active(self, point: Mapping[str, Value]) -> bool:
        """Whether the parameters decided so far call for this one."""
        return all(
            name in point and any(_same(point[name], value) for value in values)
            for name, values in self.when.items()
        )

    @abstractmethod
    def suggest(self, trial: Suggester) -> Value:
        """The value an Optuna trial proposes."""

    @abstractmethod
    def at(self, unit: float) -> Value:
        """The value at a position of [0, 1): equal shares for choices, linear or log for ranges."""

    @abstractmethod
    def grid(self) -> list[Value]:
        """All values of a grid search, in a fixed order.

        Raises:
            ConfigError: A range of real numbers without `num`.
        """

    @abstractmethod
    def contains(self, value: Value) -> bool:
        """Whether the space can produce this value."""


@dataclass(frozen=True, kw_only=True)
class Choice(Parameter):
    """One of a few values."""

    values: tuple[Value, ...]

    def suggest(self, trial: Suggester) -> Value:
        """See `Parameter`; lists and mappings go through Optuna as JSON text."""
        labels = [_label(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(self.name, labels))]

    def at(self, unit: float) -> Value:
        """See `Parameter`."""
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]

    def grid(self) -> list[Value]:
        """See `Parameter`."""
        return list(self.values)

    def contains(self, value: Value) -> bool:
        """See `Parameter`."""
        return any(_same(value, one) for one in self.values)


@dataclass(frozen=True, kw_only=True)
class IntRange(Parameter):
    """An integer between two inclusive ends."""

    low: int
    high: int
    step: int = 1

    def suggest(self, trial: Suggester) -> Value:
        """See `Parameter`."""
        return trial.suggest_int(self.name, self.low, self.high, step=self.step)

    def at(self, unit: float) -> Value:
        """See `Parameter`."""
        values = self.grid()
        return values[min(int(unit * len(values)), len(values) - 1)]

    def grid(self) -> list[Value]:
        """See `Parameter`."""
        return list(range(self.low, self.high + 1, self.step))

    def contains(self, value: Value) -> bool:
        """See `Parameter`."""
        return not isinstance(value, bool) and value in self.grid()


@dataclass(frozen=True, kw_only=True)
class FloatRange(Parameter):
    """A real number between two inclusive ends, on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool = False
    num: int | None = None

    def suggest(self, trial: Suggester) -> Value:
        """See `Parameter`."""
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def at(self, unit: float) -> Value:
        """See `Parameter`."""
        if self.log:
            value = math.exp(math.log(self.low) + unit * math.log(self.high / self.low))
        else:
            value = self.low + unit * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def grid(self) -> list[Value]:
        """See `Parameter`."""
        if self.num is None:
            raise ConfigError(
                f"space.{self.name}.num must be set for a grid, got none. "
                "Set the number of grid points, or use another sampler."
            )
        return [self.at(index / max(self.num - 1, 1)) for index in range(self.num)]

    def contains(self, value: Value) -> bool:
        """See `Parameter`."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high


@dataclass(frozen=True)
class Space:
    """Parameters in the order in which they are decided."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: Suggester) -> Point:
        """A point from an Optuna trial (define-by-run)."""
        return self._walk(lambda parameter: parameter.suggest(trial))

    def at(self, units: Sequence[float]) -> Point:
        """A point from one coordinate in [0, 1) per parameter; inactive ones are ignored."""
        by_name = dict(zip((one.name for one in self.parameters), units, strict=True))
        return self._walk(lambda parameter: parameter.at(by_name[parameter.name]))

    def grid(self) -> Iterator[Point]:
        """All points; the last parameter varies fastest."""
        return self._expand({}, 0)

    def contains(self, point: Mapping[str, Value]) -> bool:
        """Whether the space can produce exactly this point."""
        active: Point = {}
        for parameter in self.parameters:
            if not parameter.is_active(active):
                continue
            if parameter.name not in point or not parameter.contains(point[parameter.name]):
                return False
            active[parameter.name] = point[parameter.name]
        return len(active) == len(point)

    def _walk(self, decide: Callable[[Parameter], Value]) -> Point:
        point: Point = {}
        for parameter in self.parameters:
            if parameter.is_active(point):
                point[parameter.name] = decide(parameter)
        return point

    def _expand(self, point: Point, index: int) -> Iterator[Point]:
        if index == len(self.parameters):
            yield dict(point)
            return
        parameter = self.parameters[index]
        if not parameter.is_active(point):
            yield from self._expand(point, index + 1)
            return
        for value in parameter.grid():
            yield from self._expand({**point, parameter.name: value}, index + 1)


def parse_space(definition: Mapping[str, Any]) -> Space:
    """Reads the `space` section of a sweep file.

    Args:
        definition: `{name: {choice: [...]} | {int: [low, high], step: 1} | {float: [low, high],
            num: 5} | {log: [low, high], num: 5} | {value: x}}`, each with an optional
            `when: {earlier name: value or list of values}`.

    Raises:
        ConfigError: A parameter is not one of these forms, or its condition names a later one.
    """
    parameters: list[Parameter] = []
    for name, entry in definition.items():
        seen = [one.name for one in parameters]
        parameters.append(_parse(name, entry, earlier=seen))
    return Space(tuple(parameters))


def apply_point(base: Mapping[str, Any], point: Mapping[str, Value]) -> dict[str, Any]:
    """A nested configuration with the values of a point set at their dotted names.

    Args:
        base: Nested mapping; not changed.
        point: Values by dotted name.

    Raises:
        ConfigError: A name goes through a value that is not a mapping.
    """
    merged: dict[str, Any] = json.loads(json.dumps(base))
    for name, value in point.items():
        *path, last = name.split(".")
        node = merged
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"space.{name} must lead through mappings, got a value at {part!r}. "
                    "Check the name."
                )
        node[last] = value
    return merged


def optuna_values(point: Mapping[str, Value]) -> dict[str, Any]:
    """A point as Optuna stores it: lists and mappings as JSON text."""
    return {name: _label(value) for name, value in point.items()}


def label_point(point: Mapping[str, Value]) -> str:
    """A point on one line for people: `rq_vae levels=3 behaviour.alpha=0.5 bucket`.

    A kind speaks for itself; a field deep inside a section keeps the name that it belongs to.
    """
    words = []
    for name, value in point.items():
        parts = name.split(".")
        label = ".".join(parts[max(2, len(parts) - 2) :]) or parts[-1]
        words.append(_short(value) if parts[-1] == "kind" else f"{label}={_short(value)}")
    return " ".join(words)


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(_label(value))


def _label(value: Value) -> Any:
    is_scalar = value is None or isinstance(value, (bool, int, float, str))
    return value if is_scalar else json.dumps(value)


def _same(first: Value, second: Value) -> bool:
    # `True == 1` in Python, yet they are two choices.
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)


def _parse(name: str, entry: Any, *, earlier: Sequence[str]) -> Parameter:
    where = f"space.{name}"
    if not isinstance(entry, Mapping) or sum(kind in entry for kind in _KINDS) != 1:
        raise ConfigError(
            f"{where} must have one of {', '.join(_KINDS)}, got {entry!r}. "
            f"Write {name}: {{choice: [a, b]}}."
        )
    kind = next(one for one in _KINDS if one in entry)
    options = _OPTIONS.get(kind, ("when",))
    unknown = set(entry) - {kind, *options}
    if unknown:
        raise ConfigError(
            f"{where} must have only {kind}, {', '.join(options)}, got "
            f"{', '.join(sorted(unknown))}. Remove it."
        )
    when = _parse_when(where, entry.get("when", {}), earlier)
    if kind == "value":
        return Choice(name=name, when=when, values=(entry[kind],))
    if kind == "choice":
        return Choice(name=name, when=when, values=_parse_choices(where, entry[kind]))
    low, high = _parse_range(where, kind, entry[kind])
    if kind == "int":
        return IntRange(
            name=name, when=when, low=int(low), high=int(high), step=int(entry.get("step", 1))
        )
    return FloatRange(
        name=name, when=when, low=low, high=high, log=kind == "log", num=entry.get("num")
    )


def _parse_choices(where: str, values: Any) -> tuple[Value, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"{where}.choice must be a list of values, got {values!r}. List them.")
    for index, value in enumerate(values):
        if any(_same(value, other) for other in values[:index]):
            raise ConfigError(f"{where}.choice must not repeat, got {value!r} twice. Remove one.")
    return tuple(values)


def _parse_range(where: str, kind: str, ends: Any) -> tuple[float, float]:
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    if not is_pair or any(isinstance(end, bool) or not _is_number(end) for end in ends):
        raise ConfigError(f"{where}.{kind} must be [low, high], got {ends!r}. Write two numbers.")
    low, high = ends
    if low > high or (kind == "log" and low <= 0):
        rule = "0 < low <= high" if kind == "log" else "low <= high"
        raise ConfigError(f"{where}.{kind} must satisfy {rule}, got {ends!r}. Change the ends.")
    if kind == "int" and (int(low) != low or int(high) != high):
        raise ConfigError(f"{where}.int must have whole ends, got {ends!r}. Use float.")
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _parse_when(where: str, condition: Any, earlier: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    if not isinstance(condition, Mapping):
        raise ConfigError(f"{where}.when must map names to values, got {condition!r}.")
    for name in condition:
        if name not in earlier:
            raise ConfigError(
                f"{where}.when must name a parameter above it, got {name!r}. "
                f"Parameters above: {', '.join(earlier) or 'none'}."
            )
    return {
        name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for name, value in condition.items()
    }
