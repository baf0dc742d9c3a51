"""Typed configuration: dataclass defaults ← YAML ← mapping ← `key=value`, converted once.

OmegaConf merges and checks types; nothing of it leaves this module. Everywhere else a
configuration is a plain dataclass. A component that comes in several kinds (quantizer, resolver,
generator) is a family: a direct subclass of `Component` is its root, and the root's subclasses are
the choices, picked by the value of their `kind` field.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from forge_ray.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(kw_only=True)
class Component:
    """Base of configurations that come in several kinds; see the module docstring."""

    kind: str = ""

    @classmethod
    def choices(cls) -> dict[str, type[Component]]:
        """The kinds of this family, by name, in order of definition."""
        found: dict[str, type[Component]] = {}
        for child in cls.__subclasses__():
            kind = child.__dataclass_fields__["kind"].default
            if isinstance(kind, str) and _declares_kind(child):
                found[kind] = child
            found.update(child.choices())
        return found


def _declares_kind(cls: type) -> bool:
    # A choice narrows `kind` to its own literal; an intermediate base inherits it.
    return "kind" in inspect.get_annotations(cls)


def load_config(
    schema: type[T],
    *,
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> T:
    """Builds one typed configuration from its sources, later ones winning.

    Args:
        schema: Dataclass that describes the configuration; its defaults come first.
        path: YAML file, a mapping at its top.
        overrides: `dotted.key=value` items; values are parsed as YAML.
        values: Nested mapping, applied after the file and before `overrides`.

    Returns:
        An instance of `schema`; its `__post_init__` checks have run.

    Raises:
        ConfigError: Unknown key, wrong type, broken rule or unreadable file.
    """
    given = OmegaConf.create({})
    if path is not None:
        given = _merge(given, OmegaConf.create(_read_yaml(Path(path))))
    if values is not None:
        given = _merge(given, OmegaConf.create(_plain(dict(values))))
    given = _merge(given, _dotlist(overrides))
    try:
        merged = OmegaConf.merge(_structured(schema, given, at=""), given)
        _require_finite(OmegaConf.to_container(merged))
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def from_mapping(schema: type[T], mapping: Mapping[str, Any]) -> T:
    """The configuration that `to_mapping` wrote, equal to the original."""
    return load_config(schema, values=mapping)


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, lists and JSON scalars, keys in field order."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """A dataclass as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces. Raises TypeError on non-JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_dotlist(mapping: Mapping[str, Any]) -> list[str]:
    """`{"a.b": value}` as overrides whose values keep their type (`null`, `1e5`, `"on"`)."""
    # As YAML, JSON's escapes of characters beyond 16 bits would be two halves.
    return [
        f"{key}={json.dumps(_plain(value), ensure_ascii=False)}" for key, value in mapping.items()
    ]


def to_overrides(config: Any) -> list[str]:
    """The `key=value` items that make `load_config` build this configuration again.

    Args:
        config: dataclass whose fields all have defaults.

    Returns:
        One item for each kind of a component and for each value that differs from its default.
        Quote them for a shell with `shlex.join`.
    """
    given = to_mapping(config)
    leaves = dict(_leaves(given))
    kinds = load_config(type(config), values=_kinds(given))
    defaults = dict(_leaves(to_mapping(kinds)))
    return to_dotlist(
        {
            path: value
            for path, value in leaves.items()
            if path.rpartition(".")[2] == "kind" or path not in defaults or value != defaults[path]
        }
    )


def _leaves(mapping: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        # A key that an override could not spell stays inside its mapping.
        if isinstance(value, Mapping) and value and all(map(_is_plain_key, value)):
            yield from _leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def _is_plain_key(key: str) -> bool:
    return bool(key) and not set(key) & set(".=[]")


def _kinds(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with nothing left in it but `kind`."""
    inner = {name: _kinds(value) for name, value in mapping.items() if isinstance(value, Mapping)}
    own = {name: value for name, value in mapping.items() if name == "kind"}
    return own | {name: value for name, value in inner.items() if value}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} must be a YAML file, got no such file. Check the path.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be valid YAML, got: {error}. Fix the file.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"{path} must hold a mapping at its top, got {kind}. Write `key: value`.")
    return content


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override must be key=value, got {item!r}. Write {item}=….")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override must parse as YAML, got {error}. Quote the value.") from error


def _merge(first: DictConfig, second: DictConfig) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(first, second))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def _structured(schema: Any, given: Any, *, at: str) -> DictConfig:
    """`schema` (a class or an instance) as a node whose families carry the kinds `given` asks."""
    node = OmegaConf.structured(schema)
    if not isinstance(given, DictConfig):
        return node
    cls = schema if isinstance(schema, type) else type(schema)
    for name, hint in typing.get_type_hints(cls).items():
        if name not in given:
            continue
        default = _default_of(schema, name)
        here = f"{at}.{name}" if at else name
        family, inner = _dataclass_in(hint), _value_class(hint)
        if family is not None and isinstance(given[name], DictConfig):
            node[name] = _chosen(family, given[name], default, at=here)
        elif inner is not None and isinstance(given[name], DictConfig):
            for key, value in given[name].items():
                if isinstance(value, DictConfig):
                    before = (default or {}).get(key)
                    node[name][key] = _chosen(inner, value, before, at=f"{here}.{key}")
        elif inner is not None and _holds_mappings(given[name]):
            # A list replaces its default, so it is complete here; merged again it would lose kinds.
            node[name] = _typed_entries(inner, given.pop(name), at=here)
    return node


def _chosen(family: type, given: DictConfig, default: Any, *, at: str) -> DictConfig:
    """The node of the kind that `given` asks for, at `default` where that is of this kind."""
    chosen = _choose(family, given, default, at=at)
    keep = default is not None and type(default) is chosen
    return _structured(default if keep else chosen, given, at=at)


def _holds_mappings(given: Any) -> bool:
    return isinstance(given, ListConfig) and all(isinstance(one, DictConfig) for one in given)


def _typed_entries(family: type, given: ListConfig, *, at: str) -> list[Any]:
    """The mappings of a list as nodes of their kinds."""
    nodes = [
        (_chosen(family, value, None, at=f"{at}.{place}"), value)
        for place, value in enumerate(given)
    ]
    return [OmegaConf.merge(node, value) for node, value in nodes]


def _default_of(schema: Any, name: str) -> Any:
    if not isinstance(schema, type):
        return getattr(schema, name)
    field = {one.name: one for one in dataclasses.fields(schema)}[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`, else None."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    classes = [one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)]
    return classes[0] if len(classes) == 1 else None


def _value_class(hint: Any) -> type | None:
    """The dataclass X in `dict[str, X]` or `list[X]`, else None."""
    values = typing.get_args(hint)[-1:] if typing.get_origin(hint) in (dict, list) else ()
    return _dataclass_in(values[0]) if values else None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _choose(family: type, given: DictConfig, default: Any, *, at: str) -> type:
    if not issubclass(family, Component):
        return family
    choices = family.choices()
    kind = given.get("kind", getattr(default, "kind", None))
    if kind not in choices:
        near = difflib.get_close_matches(str(kind), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Set {at}.kind."
        raise ConfigError(f"{at}.kind must be one of {', '.join(choices)}, got {kind!r}. {hint}")
    return choices[kind]


def _require_finite(value: Any, at: str = "") -> None:
    # NaN passes every check that asks for a number below a bound, and no manifest can hold it.
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{at} must be finite, got {value}. Change the value.")
    parts = value.items() if isinstance(value, dict) else ()
    for name, part in enumerate(value) if isinstance(value, list) else parts:
        _require_finite(part, f"{at}.{name}" if at else str(name))


def _explain(error: OmegaConfBaseException) -> str:
    path = getattr(error, "full_key", None) or "configuration"
    rule = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, ConfigKeyError):
        known = getattr(error.object_type, "__dataclass_fields__", {})
        fields = f" Known keys: {', '.join(known)}." if known else ""
        return f"{path} must be a known key: {rule}.{fields}"
    return f"{path} must have the declared type: {rule}. Change the value."
