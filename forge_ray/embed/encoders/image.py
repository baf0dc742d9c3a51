"""Image encoders: the image tower of a CLIP, or a vision transformer.

Needs Pillow (`pip install 'forge-ray[embed]'`); it is imported only when images are encoded.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.embed.encoders.base import (
    EMPTY,
    Encoded,
    Encoder,
    EncoderConfig,
    FloatArray,
    autocast,
    finish,
)
from forge_ray.embed.encoders.model import ModelFolder
from forge_ray.errors import ArtifactError, ConfigError

MISSING_FILE = "missing_file"
"""Cause of rejection: no file stands at the path."""
UNDECODABLE = "undecodable"
"""Cause of rejection: the bytes are no image that Pillow reads."""


@dataclass(kw_only=True)
class ImageConfig(EncoderConfig):
    """Vectors of the items' images. The key knows their paths, not their bytes."""

    kind: Literal["image"] = "image"
    columns: list[str] = field(default_factory=lambda: ["image_path"])
    """The one column with paths or URIs, or with the images' bytes."""
    root: str = ""
    """Folder or URI below which relative paths lie; empty for the working directory."""
    batch_size: int = 32
    """Images the model sees at once."""

    def __post_init__(self) -> None:
        """Check that there is one column."""
        super().__post_init__()
        if len(self.columns) != 1:
            raise ConfigError(f"columns must name one column for images, got {self.columns}.")

    @property
    def wanted(self) -> str:
        """What a row must hold."""
        return "an image"

    def absolute(self) -> ImageConfig:
        """The same configuration with an absolute root."""
        is_uri = "://" in self.root
        return replace(self, root=self.root if is_uri else str(Path(self.root).resolve()))

    def load(self, model: ModelFolder) -> ImageEncoder:
        """Load image processor and model; see `EncoderConfig.load`."""
        return ImageEncoder(self, model.path)

    def is_empty(self, items: pa.Table) -> npt.NDArray[np.bool_] | None:
        """Tell which rows hold no path; columns of bytes are not read twice."""
        column = items[self.columns[0]].combine_chunks()
        if not _holds_paths(column.type):
            return None
        is_blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
        return np.asarray(is_blank.to_numpy(zero_copy_only=False))


class ImageEncoder(Encoder):
    """An image processor and a vision model."""

    def __init__(self, config: ImageConfig, folder: Path) -> None:
        require_pillow()
        from transformers import AutoImageProcessor, AutoModel

        self._config = config
        self._open = ImageReader(config.root)
        self._pool = ThreadPoolExecutor(max(1, int(config.cpus_per_actor)))
        try:
            # Always Pillow's pixels: torchvision rounds differently, and may not be there.
            self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model must be an image encoder that transformers loads, got {folder}: {reason} "
                "Use another model."
            ) from error
        self._model = model.eval().to(config.device)
        self._has_towers = hasattr(model, "get_image_features")
        self.dim = self._embed([np.zeros((8, 8, 3), dtype=np.uint8)]).shape[1]

    def encode(self, items: pa.Table) -> Encoded:
        """Encode every row; see `Encoder.encode`. Memory: one batch of decoded images."""
        config = self._config
        column = items[config.columns[0]].combine_chunks()
        out = np.zeros((len(column), self.dim), dtype=np.float32)
        rejected: dict[int, str] = {}
        for start in range(0, len(column), config.batch_size):
            values = column.slice(start, config.batch_size).to_pylist()
            opened = list(self._pool.map(self._open, values))
            rejected |= {start + n: one for n, one in enumerate(opened) if isinstance(one, str)}
            images = {start + n: one for n, one in enumerate(opened) if not isinstance(one, str)}
            if images:
                out[list(images)] = self._embed(list(images.values()))
        return Encoded(out, rejected)

    @torch.inference_mode()
    def _embed(self, images: list[npt.NDArray[np.uint8]]) -> FloatArray:
        # Stated because a picture of height 3 would pass for one with three planes.
        pixels = self._processor(
            images=images, return_tensors="pt", input_data_format="channels_last"
        ).to(self._config.device)
        with autocast(self._config.device, self._config.precision):
            vectors = self._vectors(pixels)
        return finish(vectors, normalize=self._config.normalize)

    def _vectors(self, pixels: Any) -> torch.Tensor:
        found = (
            self._model.get_image_features(**pixels) if self._has_towers else self._model(**pixels)
        )
        if isinstance(found, torch.Tensor):
            return found
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class ImageReader:
    """Opens images by path, URI or bytes; what cannot be opened is answered by its cause."""

    def __init__(self, root: str) -> None:
        """Remember where relative paths lie.

        Args:
            root: folder or URI; empty for the working directory.
        """
        self._filesystem, self._root = open_filesystem(root or ".")
        self._others: dict[str, pafs.FileSystem] = {}

    def __call__(self, value: Any) -> npt.NDArray[np.uint8] | str:
        """Open one image.

        Args:
            value: path, URI, bytes, or a mapping with `bytes` or `path`; None for nothing.

        Returns:
            uint8 [height, width, 3], or the cause of rejection.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value or (isinstance(value, str) and not value.strip()):
            return EMPTY
        content = value if isinstance(value, bytes) else self._read(value.strip())
        return MISSING_FILE if content is None else _decode(content)

    def _read(self, path: str) -> bytes | None:
        try:
            filesystem, inner = self._locate(path)
            with filesystem.open_input_stream(inner) as stream:
                return bytes(stream.read())
        except (OSError, ArtifactError):
            return None

    def _locate(self, path: str) -> tuple[pafs.FileSystem, str]:
        scheme, mark, rest = path.partition("://")
        if not mark:
            is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
            inner = str(Path(self._root, path)) if is_local else f"{self._root}/{path}"
            return self._filesystem, inner
        # A client for each bucket, not for each image.
        place = f"{scheme}://{rest.partition('/')[0]}"
        if place not in self._others:
            self._others[place] = open_filesystem(path)[0]
        return self._others[place], rest if scheme != "file" else f"/{rest.lstrip('/')}"


def require_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "images need Pillow, got none. Install it: pip install 'forge-ray[embed]'."
        ) from error


def _decode(content: bytes) -> npt.NDArray[np.uint8] | str:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # Pillow's readers raise any of these on damaged bytes.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return UNDECODABLE


def _holds_paths(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))
