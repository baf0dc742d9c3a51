"""The search space: named parameters, their values, and the conditions under which they exist.

A point is a flat mapping from dotted configuration names to values, e.g.
`{"sid.quantizer.kind": "rq_vae", "sid.quantizer.levels": 3}`. A space makes points in three ways
that agree on what a point is: from an Optuna trial, from numbers in the unit cube (quasi-random
search), and as a grid. It knows neither the configurations that points are applied to, nor Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.sweep.parameters import (
    Choice,
    FloatRange,
    IntRange,
    Parameter,
    Schedule,
    Suggester,
    Value,
    label,
    same,
)

Point = dict[str, Value]

MIN_SIZE = 8
"""Smallest codebook of a schedule unless it says otherwise: 3 bits a level."""

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "choice": (),
    "int": ("step",),
    "float": ("num",),
    "log": ("num",),
    "value": (),
    "component": (),
    "schedule": (),
}
"""The forms of an entry, and what each takes beside `when`."""


@dataclass(frozen=True)
class Space:
    """Parameters in the order in which they are decided."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: Suggester) -> Point:
        """A point from an Optuna trial (define-by-run)."""
        return self._walk(lambda parameter, point: parameter.suggest(trial, point))

    def optuna_values(self, point: Mapping[str, Value]) -> dict[str, Any]:
        """The Optuna parameters that make `suggest` give a point of this space again."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_active(point):
                values |= parameter.optuna_values(point[parameter.name], point)
        return values

    def at(self, units: Sequence[float]) -> Point:
        """A point from one coordinate in [0, 1) per parameter; inactive ones are ignored."""
        by_label = dict(zip((one.label for one in self.parameters), units, strict=True))
        return self._walk(lambda parameter, point: parameter.at(by_label[parameter.label], point))

    def grid(self) -> Iterator[Point]:
        """All points; the last parameter varies fastest."""
        return self._expand({}, 0)

    def contains(self, point: Mapping[str, Value]) -> bool:
        """Whether the space can produce exactly this point."""
        active: Point = {}
        for parameter in self.parameters:
            if not parameter.is_active(active):
                continue
            if parameter.name not in point:
                return False
            if not parameter.contains(point[parameter.name], active):
                return False
            active[parameter.name] = point[parameter.name]
        return len(active) == len(point)

    def _walk(self, decide: Callable[[Parameter, Point], Value]) -> Point:
        point: Point = {}
        for parameter in self.parameters:
            if parameter.is_active(point):
                point[parameter.name] = decide(parameter, point)
        return point

    def _expand(self, point: Point, index: int) -> Iterator[Point]:
        if index == len(self.parameters):
            yield dict(point)
            return
        parameter = self.parameters[index]
        if not parameter.is_active(point):
            yield from self._expand(point, index + 1)
            return
        for value in parameter.grid(point):
            yield from self._expand({**point, parameter.name: value}, index + 1)


def parse_space(definition: Mapping[str, Any]) -> Space:
    """Reads the `space` section of a sweep file.

    Args:
        definition: `{name: entry}` with an entry of one of these forms, each with an optional
            `when: {earlier name: value or list of values}`:
            `{choice: [...]}`, `{int: [low, high], step: 1}`, `{float: [low, high], num: 5}`,
            `{log: [low, high], num: 5}`, `{value: x}`,
            `{component: {kind: {field: entry}}}`: `name.kind` and the fields of the chosen kind,
            `{schedule: {levels: [low, high], first: [...], ratio: [...], min_size: 8}}`: a list of
            sizes, and beside it the parameter `levels`.

    Raises:
        ConfigError: A parameter is not one of these forms, its condition names a later one, or two
            parameters of one name may exist at once.
    """
    parameters: list[Parameter] = []
    for name, entry in definition.items():
        _add(parameters, _Place(name=str(name)), entry)
    return Space(tuple(parameters))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an entry stands: its full name and the component kinds around it."""

    name: str
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"space.{self.name}" + (f" ({self.variant})" if self.variant else "")

    @property
    def variant(self) -> str:
        return "/".join(self.kinds.values())

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    def inside(self, kind: str, name: str) -> _Place:
        return _Place(name=f"{self.name}.{name}", kinds={**self.kinds, f"{self.name}.kind": kind})

    def beside(self, name: str) -> _Place:
        return _Place(name=f"{self.parent}.{name}" if self.parent else name, kinds=self.kinds)


def _add(parameters: list[Parameter], place: _Place, entry: Any) -> None:
    """Appends what an entry stands for: one parameter, or several for the compound forms."""
    form = _form(place, entry)
    when = _parse_when(place, entry.get("when", {}), [one.name for one in parameters])
    if form == "component":
        _add_component(parameters, place, entry[form], entry.get("when", {}))
    elif form == "schedule":
        _add_schedule(parameters, place, entry[form], when)
    else:
        _append(parameters, _parse(place, form, entry, when))


def _append(parameters: list[Parameter], parameter: Parameter) -> None:
    for other in parameters:
        if other.name == parameter.name and not _exclude(other, parameter):
            raise ConfigError(
                f"space.{parameter.name} must be given once, got it twice for the same designs. "
                "Remove one, or give them conditions (when) that exclude each other."
            )
    parameters.append(parameter)


def _exclude(first: Parameter, second: Parameter) -> bool:
    return any(
        not any(same(one, other) for one in first.when[name] for other in second.when[name])
        for name in {*first.when} & {*second.when}
    )


def _add_component(parameters: list[Parameter], place: _Place, kinds: Any, when: Any) -> None:
    if not isinstance(kinds, Mapping) or not kinds:
        raise ConfigError(
            f"{place.where}.component must map kinds to what is searched in each, got {kinds!r}. "
            "Write {component: {rq_kmeans: {levels: {int: [2, 4]}}, fsq: {}}}."
        )
    kind_place = _Place(name=f"{place.name}.kind", kinds=place.kinds)
    _add(parameters, kind_place, {"choice": list(kinds), "when": when})
    for kind, entries in kinds.items():
        if not isinstance(entries or {}, Mapping):
            raise ConfigError(
                f"{place.where}.component.{kind} must map fields to entries, got {entries!r}."
            )
        for name, entry in (entries or {}).items():
            _add(parameters, place.inside(kind, name), entry)


def _add_schedule(
    parameters: list[Parameter], place: _Place, entry: Any, when: Mapping[str, tuple[Value, ...]]
) -> None:
    names = ("levels", "first", "ratio", "min_size")
    if not isinstance(entry, Mapping) or not {"levels", "first"} <= {*entry} <= {*names}:
        raise ConfigError(
            f"{place.where}.schedule must have levels and first, may have ratio and min_size, got "
            f"{entry!r}. Write {{levels: [2, 4], first: [128, 256], ratio: [0.5, 1.0]}}."
        )
    levels = place.beside("levels")
    ends = entry["levels"]
    low, high = _parse_range(levels.where, "int", ends if _is_list(ends) else [ends, ends])
    first = _parse_choices(f"{place.where}.schedule.first", entry["first"])
    ratio = _parse_choices(f"{place.where}.schedule.ratio", entry.get("ratio", [1.0]))
    min_size = entry.get("min_size", MIN_SIZE)
    is_whole = all(isinstance(one, int) and one >= 2 for one in (*first, min_size))
    if low < 1 or not is_whole or not all(_is_number(one) and one > 0 for one in ratio):
        raise ConfigError(
            f"{place.where}.schedule must have levels >= 1, whole first and min_size >= 2 and "
            f"ratio > 0, got {dict(entry)}. Change them."
        )
    shared: dict[str, Any] = {"when": when, "variant": place.variant}
    _append(parameters, IntRange(name=levels.name, low=int(low), high=int(high), **shared))
    sizes = {"first": tuple(first), "ratio": tuple(ratio), "min_size": min_size}
    _append(parameters, Schedule(name=place.name, levels=levels.name, **sizes, **shared))


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


def label_point(point: Mapping[str, Value]) -> str:
    """A point on one line for people: `rq_vae levels=3 behaviour.alpha=0.5 bucket`.

    A kind speaks for itself; a field deep inside a section keeps the name that it belongs to.
    """
    words = []
    for name, value in point.items():
        parts = name.split(".")
        shown = ".".join(parts[max(2, len(parts) - 2) :]) or parts[-1]
        words.append(_short(value) if parts[-1] == "kind" else f"{shown}={_short(value)}")
    return " ".join(words)


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(label(value))


def _form(place: _Place, entry: Any) -> str:
    if not isinstance(entry, Mapping) or sum(form in entry for form in _OPTIONS) != 1:
        raise ConfigError(
            f"{place.where} must have one of {', '.join(_OPTIONS)}, got {entry!r}. "
            f"Write {place.name}: {{choice: [a, b]}}."
        )
    form = next(one for one in _OPTIONS if one in entry)
    allowed = (form, "when", *_OPTIONS[form])
    unknown = set(entry) - set(allowed)
    if unknown:
        raise ConfigError(
            f"{place.where} must have only {', '.join(allowed)}, got "
            f"{', '.join(sorted(unknown))}. Remove it."
        )
    return form


def _parse(
    place: _Place, form: str, entry: Mapping[str, Any], when: Mapping[str, tuple[Value, ...]]
) -> Parameter:
    shared: dict[str, Any] = {"name": place.name, "when": when, "variant": place.variant}
    if form == "value":
        return Choice(values=(entry[form],), **shared)
    if form == "choice":
        return Choice(values=_parse_choices(f"{place.where}.choice", entry[form]), **shared)
    low, high = _parse_range(place.where, form, entry[form])
    if form == "int":
        step = _parse_count(f"{place.where}.step", entry.get("step", 1))
        return IntRange(low=int(low), high=int(high), step=step, **shared)
    num = None if entry.get("num") is None else _parse_count(f"{place.where}.num", entry["num"])
    return FloatRange(low=low, high=high, log=form == "log", num=num, **shared)


def _parse_count(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} must be a whole number >= 1, got {value!r}. Change it.")
    return value


def _parse_choices(where: str, values: Any) -> tuple[Value, ...]:
    if not _is_list(values) or not values:
        raise ConfigError(f"{where} must be a list of values, got {values!r}. List them.")
    for index, value in enumerate(values):
        if any(same(value, other) for other in values[:index]):
            raise ConfigError(f"{where} must not repeat, got {value!r} twice. Remove one.")
    return tuple(values)


def _parse_range(where: str, kind: str, ends: Any) -> tuple[float, float]:
    is_pair = _is_list(ends) and len(ends) == 2
    if not is_pair or not all(_is_number(end) for end in ends):
        raise ConfigError(f"{where}.{kind} must be [low, high], got {ends!r}. Write two numbers.")
    low, high = ends
    if low > high or (kind == "log" and low <= 0):
        rule = "0 < low <= high" if kind == "log" else "low <= high"
        raise ConfigError(f"{where}.{kind} must satisfy {rule}, got {ends!r}. Change the ends.")
    if kind == "int" and (int(low) != low or int(high) != high):
        raise ConfigError(f"{where}.int must have whole ends, got {ends!r}. Use float.")
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _parse_when(
    place: _Place, condition: Any, earlier: Sequence[str]
) -> dict[str, tuple[Value, ...]]:
    if not isinstance(condition, Mapping):
        raise ConfigError(f"{place.where}.when must map names to values, got {condition!r}.")
    when: dict[str, tuple[Value, ...]] = {name: (kind,) for name, kind in place.kinds.items()}
    for name, value in condition.items():
        # Inside a component, a field may be named as its siblings name it.
        near = place.beside(name).name if place.kinds else name
        full = near if near in earlier else name
        if full not in earlier:
            raise ConfigError(
                f"{place.where}.when must name a parameter above it, got {name!r}. "
                f"Parameters above: {', '.join(dict.fromkeys(earlier)) or 'none'}."
            )
        when[full] = tuple(value) if _is_list(value) else (value,)
    return when
