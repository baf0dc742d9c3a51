"""Compiled functions in place of modules' own, and the compiler that they need.

Blocks are compiled one by one, so that hooks around them (DeepSpeed's) stay outside and blocks of
equal shape share one piece of code. Only `forward` is replaced: names of weights stay. Knows
torch.compile; knows nothing about models.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from forge_ray.errors import ConfigError

BACKEND = "inductor"
"""Of torch.compile."""


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Lets modules run compiled from now on; the compiling itself comes with their first pass.

    Args:
        blocks: modules, none inside another.
        device: that they run on.

    Raises:
        ConfigError: there is no compiler for it.
    """
    check_compiler(device)
    # Dropout draws what it draws without compiling, on CPUs bit for bit.
    options: dict[str, Any] | None = {"fallback_random": True} if BACKEND == "inductor" else None
    for block in blocks:
        # Rows and lengths change from batch to batch; without `dynamic` each would compile anew.
        compiled = torch.compile(block.forward, dynamic=True, backend=BACKEND, options=options)
        block.forward = compiled


def check_compiler(device: torch.device) -> None:
    """Refuses to compile where the first step would fail for want of a compiler.

    Args:
        device: that will run the code.

    Raises:
        ConfigError: there is none.
    """
    if device.type == "cuda":
        kind, variable, names = "C", "CC", ["gcc", "clang"]
    else:
        kind, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    chosen = os.environ.get(variable)
    wanted = [chosen] if chosen else names
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"engine.compile must be false on machines without a {kind} compiler, got true and no "
            f"{' or '.join(wanted)}. Install one on every node (apt-get install g++), or leave it "
            "out."
        )
