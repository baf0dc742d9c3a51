"""Configuration: merging, component switching, messages and the round trip."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from forge_ray.config import (
    Component,
    from_mapping,
    load_config,
    to_dotlist,
    to_mapping,
    to_overrides,
    to_yaml,
)
from forge_ray.errors import ConfigError


@dataclass(kw_only=True)
class Shape(Component):
    kind: str = "circle"


@dataclass(kw_only=True)
class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(kw_only=True)
class Box(Shape):
    kind: Literal["box"] = "box"
    sides: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(kw_only=True)
class Layer:
    shape: Shape = field(default_factory=lambda: Circle(radius=5.0))
    extra: Shape | None = None


@dataclass(kw_only=True)
class Drawing:
    layer: Layer = field(default_factory=Layer)
    title: str = "untitled"
    scale: int = 1
    out: Path | None = None
    named: dict[str, Layer] = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=list)
    by_name: dict[str, Shape] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.scale, int) and self.scale < 1:
            raise ConfigError(f"scale must be >= 1, got {self.scale}. Set scale to 1 or more.")


def test_defaults_keep_the_values_of_their_factory() -> None:
    assert load_config(Drawing).layer.shape == Circle(radius=5.0)


def test_an_override_of_the_same_kind_keeps_the_other_defaults() -> None:
    drawing = load_config(Drawing, overrides=["layer.shape.kind=circle", "scale=2"])
    assert drawing.layer.shape == Circle(radius=5.0)
    assert drawing.scale == 2


def test_kind_switches_the_component_from_every_source(tmp_path: Path) -> None:
    file = tmp_path / "drawing.yaml"
    file.write_text("layer: {shape: {kind: box, sides: [3]}}")
    assert load_config(Drawing, path=file).layer.shape == Box(sides=[3])
    assert load_config(Drawing, overrides=["layer.shape.kind=box"]).layer.shape == Box()
    by_value = load_config(Drawing, values={"layer": {"shape": {"kind": "box"}}})
    assert by_value.layer.shape == Box()
    optional = load_config(Drawing, overrides=["layer.extra.kind=box"])
    assert optional.layer.extra == Box()


def test_kinds_are_chosen_inside_lists_and_mappings(tmp_path: Path) -> None:
    file = tmp_path / "drawing.yaml"
    file.write_text(
        "shapes: [{kind: box, sides: [3]}, {kind: circle}]\n"
        "by_name: {door: {kind: box}, sun: {kind: circle, radius: 2}}\n"
        "layers: [{shape: {kind: box}}, {}]"
    )
    drawing = load_config(Drawing, path=file, overrides=["by_name.door.sides=[9]"])
    assert drawing.shapes == [Box(sides=[3]), Circle()]
    assert drawing.by_name == {"door": Box(sides=[9]), "sun": Circle(radius=2.0)}
    assert drawing.layers == [Layer(shape=Box()), Layer()]
    assert load_config(Drawing, overrides=["shapes=[{kind: box}]"]).shapes == [Box()]


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "drawing.yaml"
    file.write_text("title: file\nscale: 3")
    drawing = load_config(Drawing, path=file, values={"title": "value"}, overrides=["scale=4"])
    assert (drawing.title, drawing.scale) == ("value", 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("titel=x", ["titel", "Did you mean", "title", "layer"]),
        ("layer.shape.radios=2", ["layer.shape.radios", "radius"]),
        ("layer.shape.kind=bax", ["layer.shape.kind", "circle, box", "'bax'", "'box'"]),
        ("scale=wide", ["scale", "'wide'", "Integer"]),
        ("scale=1.5", ["scale", "1.5"]),
        ("scale=0", ["scale must be >= 1, got 0"]),
        ("scale", ["key=value"]),
        ("shapes=[{kind: bax}]", ["shapes.0.kind", "circle, box", "'bax'", "'box'"]),
        ("shapes=[{kind: box, radius: 1}]", ["radius", "sides"]),
        ("by_name.a.kind=bax", ["by_name.a.kind", "'box'"]),
        ("by_name.sun={kind: circle, radios: 1}", ["by_name.sun.radios", "radius"]),
        ("by_name.sun={radius: 1}", ["by_name.sun.kind must be one of", "None"]),
        ("layers=[{shap: 1}]", ["shap", "shape"]),
        ("layer.shape.sides=[1]", ["layer.shape.sides", "radius"]),
        ("layer.shape.radius=.nan", ["layer.shape.radius must be finite", "nan"]),
        ("shapes=[{kind: circle, radius: .inf}]", ["shapes.0.radius must be finite", "inf"]),
    ],
)
def test_a_bad_override_names_path_rule_and_value(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Drawing, overrides=[override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n- b", "a: [", "42"])
def test_a_bad_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(Drawing, path=file)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Drawing, path=tmp_path / "absent.yaml")


def test_the_resolved_configuration_runs_again_unchanged(tmp_path: Path) -> None:
    drawing = load_config(
        Drawing, overrides=["layer.shape.kind=box", "layer.shape.sides=[7,8]", "out=a/b"]
    )
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(drawing))
    assert load_config(Drawing, path=file) == drawing
    assert from_mapping(Drawing, to_mapping(drawing)) == drawing


@pytest.mark.parametrize("value", ["1e5", "null", "on", "007", "a=b", 3, 0.5, True, None])
def test_a_dotlist_keeps_the_type_of_a_value(value: object) -> None:
    (item,) = to_dotlist({"key": value})
    from omegaconf import OmegaConf

    assert OmegaConf.from_dotlist([item]).key == value


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(),
        Drawing(layer=Layer(shape=Box(sides=[7, 8]), extra=Circle()), title="it's 1e5 $ 😀"),
        Drawing(shapes=[Box(sides=[]), Circle(radius=2.5)], by_name={"sun": Box(), "x": Circle()}),
        Drawing(layers=[Layer(extra=Box()), Layer()], by_name={"x.y": Box(sides=[4])}),
        Drawing(named={"a": Layer(), "b.c": Layer(shape=Circle(radius=1e-7))}, out=Path("a b")),
    ],
)
def test_overrides_build_the_configuration_again(drawing: Drawing) -> None:
    words = shlex.split(shlex.join(to_overrides(drawing)))
    assert load_config(Drawing, overrides=words) == drawing


def test_overrides_name_kinds_and_what_differs_from_the_defaults() -> None:
    drawing = Drawing(layer=Layer(shape=Box(sides=[7])), scale=2)
    assert to_overrides(drawing) == [
        'layer.shape.kind="box"',
        "layer.shape.sides=[7]",
        "scale=2",
    ]
