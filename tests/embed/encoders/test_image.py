"""Image encoders: paths, bytes and URIs give one vector, misfits their cause."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.embed.encoders.image import ImageConfig, ImageEncoder, ImageReader, require_pillow
from forge_ray.embed.encoders.model import find_model
from forge_ray.errors import ConfigError
from tests.embed.encoders.models import clip_model, text_model, vision_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("PIL", reason="pip install 'forge-ray[embed]'")
    return vision_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of one colour each, one of them 3 pixels high, and two files that are none."""
    pil = pytest.importorskip("PIL.Image", reason="pip install 'forge-ray[embed]'")
    root = tmp_path_factory.mktemp("pictures")
    colours = ("red", "green", "blue", "white", "black", "yellow")
    for number, colour in enumerate(colours):
        size = (40, 3) if number == 2 else (40, 30 + number)
        pil.new("RGB", size, colour).save(root / f"{number}.png")
    (root / "text.png").write_text("no picture")
    (root / "half.png").write_bytes((root / "5.png").read_bytes()[:60])
    return root


def encoder(model: str, **fields: object) -> ImageEncoder:
    return ImageConfig(model=model, **fields).load(find_model(model))  # type: ignore[arg-type]


def paths(values: list[str | None]) -> pa.Table:
    return pa.table({"image_path": pa.array(values, pa.string())})


def test_misfits_are_named_and_the_others_keep_their_place(folder: str, pictures: Path) -> None:
    values = ["0.png", None, "gone.png", "text.png", "1.png", "half.png", " "]
    found = encoder(folder, root=str(pictures), batch_size=3).encode(paths(values))
    assert dict(found.rejected) == {
        1: "empty", 2: "missing_file", 3: "undecodable", 5: "undecodable", 6: "empty",
    }  # fmt: skip
    assert found.vectors.any(axis=1).tolist() == [True, False, False, False, True, False, False]


def test_paths_uris_and_bytes_are_the_same_pictures(folder: str, pictures: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    by_path = encoder(folder, root=str(pictures)).encode(paths(names)).vectors
    assert by_path.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(by_path, axis=1), 1, atol=1e-6)
    absolute = [str(pictures / name) for name in names]
    uris = [f"file://{path}" for path in absolute]
    content = [(pictures / name).read_bytes() for name in names]
    for table in (
        paths(absolute),
        paths(uris),
        pa.table({"image_path": content}),
        pa.table({"image_path": [{"bytes": one, "path": None} for one in content]}),
    ):
        got = encoder(folder).encode(table)
        assert not got.rejected
        np.testing.assert_array_equal(got.vectors, by_path)


def test_a_picture_stands_as_it_was_taken(pictures: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    turned, stream = pil.new("RGB", (40, 20), "red"), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(stream, "jpeg", exif=exif)
    pixels = ImageReader("")(stream.getvalue())
    assert not isinstance(pixels, str)
    assert pixels.shape == (40, 20, 3)


@pytest.mark.parametrize("fields", [{"normalize": False}, {"precision": "bfloat16"}])
def test_every_field_changes_the_vectors(
    folder: str, pictures: Path, fields: dict[str, object]
) -> None:
    table = paths([str(pictures / f"{number}.png") for number in range(4)])
    one = encoder(folder).encode(table).vectors
    assert not np.allclose(one, encoder(folder, **fields).encode(table).vectors, atol=1e-5)


def test_the_image_tower_of_a_clip(tmp_path: Path, pictures: Path) -> None:
    model = clip_model(tmp_path / "clip")
    found = encoder(model, root=str(pictures)).encode(paths(["0.png", "1.png"])).vectors
    assert found.shape == (2, 8)


def test_what_cannot_serve_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one column for images"):
        ImageConfig(columns=["a", "b"])
    model = text_model(tmp_path / "bert")
    with pytest.raises(ConfigError, match="must be an image encoder that transformers loads"):
        encoder(model)


def test_pillow_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pip install 'forge-ray\[embed\]'"):
        require_pillow()


def test_empty_paths_are_seen_without_a_model() -> None:
    config = ImageConfig()
    is_empty = config.is_empty(paths(["a.png", None, " "]))
    assert is_empty is not None
    assert is_empty.tolist() == [False, True, True]
    assert config.is_empty(pa.table({"image_path": [b"x"]})) is None
    assert Path(config.absolute().root).is_absolute()
