"""Losses that align codes with behaviour. `KINDS` is the registry of `quantizer.alignment.kind`."""

from forge_ray.sid.alignment.batch import AlignmentBatch, KnownPairs, UserView, View
from forge_ray.sid.alignment.module import Alignment, AlignmentDims
from forge_ray.sid.alignment.presets import (
    AlignmentConfig,
    CoOccurrenceConfig,
    DasConfig,
    ForgeI2iConfig,
    LetterCfConfig,
    NoAlignmentConfig,
    RlmRecConfig,
    TermsConfig,
)
from forge_ray.sid.alignment.terms import TermConfig

KINDS: tuple[type[AlignmentConfig], ...] = (
    NoAlignmentConfig,
    TermsConfig,
    ForgeI2iConfig,
    LetterCfConfig,
    CoOccurrenceConfig,
    DasConfig,
    RlmRecConfig,
)
"""Every kind of `AlignmentConfig`; importing this package makes them known to `load_config`."""

__all__ = [
    "KINDS",
    "Alignment",
    "AlignmentBatch",
    "AlignmentConfig",
    "AlignmentDims",
    "CoOccurrenceConfig",
    "DasConfig",
    "ForgeI2iConfig",
    "KnownPairs",
    "LetterCfConfig",
    "NoAlignmentConfig",
    "RlmRecConfig",
    "TermConfig",
    "TermsConfig",
    "UserView",
    "View",
]
