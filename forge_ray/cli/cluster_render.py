"""`forge-ray cluster render`: manifests of a cluster from a few settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forge_ray.cli.console import ConfigFile, Overrides, stderr
from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.launch.render.config import PROVIDERS
from forge_ray.launch.render.files import SWEEP_RESOURCES, left_as_examples, write
from forge_ray.launch.render.files import render as render_files


def render(
    overrides: Overrides = None,
    provider: Annotated[
        str, typer.Option(help=f"Where the cluster runs: {', '.join(PROVIDERS)}.")
    ] = "kuberay",
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; without it, standard output.")
    ] = None,
) -> None:
    """Write the manifests of a cluster: `ray up` on AWS or GCP, KubeRay."""
    if provider not in PROVIDERS:
        known = ", ".join(PROVIDERS)
        raise ConfigError(f"--provider must be one of {known}, got {provider!r}. Pick one.")
    cluster = load_config(PROVIDERS[provider], path=config, overrides=overrides or ())
    texts = render_files(cluster)
    if out is None:
        manifests = {name: one for name, one in texts.items() if SWEEP_RESOURCES not in name}
        sys.stdout.write("---\n".join(f"# {name}\n{one}" for name, one in manifests.items()))
    else:
        for path in write(texts, out):
            stderr.print(f"wrote {path}", soft_wrap=True, highlight=False)
    examples = left_as_examples(cluster)
    if examples:
        stderr.print(
            f"still examples, set them before you start: {', '.join(examples)}", soft_wrap=True
        )
