"""Encoders, one file each: items in, vectors out. `KINDS` is the registry of their `kind`."""

from forge_ray.embed.encoders.base import EncoderConfig
from forge_ray.embed.encoders.image import ImageConfig
from forge_ray.embed.encoders.text import TextConfig

KINDS: tuple[type[EncoderConfig], ...] = (TextConfig, ImageConfig)
"""Every kind of `EncoderConfig`; importing this package makes them known to `load_config`."""

__all__ = ["KINDS", "EncoderConfig", "ImageConfig", "TextConfig"]
