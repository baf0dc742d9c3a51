"""The container images: linted, pinned, without secrets and without root."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.render.schemas import ROOT

IMAGES = ("Dockerfile", "Dockerfile.cpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions and their words, continued lines joined, comments left out."""
    text = (ROOT / "cluster" / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (words[0], words[2]) for line in joined.splitlines() if (words := line.partition(" "))[0]
    ]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    """A lint of instructions and, through its shell checks, of their commands."""
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)


@pytest.mark.parametrize("name", IMAGES)
def test_the_linter_has_nothing_to_say(name: str) -> None:
    done = lint(ROOT / "cluster" / name)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    text = (ROOT / "cluster/Dockerfile.cpu").read_text()
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace("ubuntu:24.04", "ubuntu:latest") + "RUN cd $HOME/x\n")
    found = lint(broken).stdout
    assert "DL3007" in found
    assert "SC2086" in found


@pytest.mark.parametrize("name", IMAGES)
def test_images_do_not_run_as_root(name: str) -> None:
    users = [words for kind, words in instructions(name) if kind == "USER"]
    # By number, or Kubernetes' runAsNonRoot refuses the pod.
    assert users == ["1000:1000"]


@pytest.mark.parametrize("name", IMAGES)
def test_versions_are_the_pinned_ones(name: str) -> None:
    pins = {line.partition(" ;")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    pinned = {pin.partition("==")[0] for pin in pins}
    found = instructions(name)
    bases = [words.split()[0] for kind, words in found if kind == "FROM"]
    assert all(re.search(r":\d", base) for base in bases)
    commands = [words for kind, words in found if kind == "RUN" and "pip install" in words]
    assert commands
    for command in commands:
        assert "--constraint constraints.txt" in command
        for package, version in re.findall(r"([A-Za-z0-9_-]+)==([0-9.]+)", command):
            assert package not in pinned or f"{package}=={version}" in pins


def test_cuda_is_the_one_that_torch_is_built_for() -> None:
    """torch 2.13 on the package index is built with CUDA 13.0; its minor version must agree."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in pins, "a new torch: look up its CUDA, change the base image"
    bases = [words.split()[0] for kind, words in instructions("Dockerfile") if kind == "FROM"]
    assert all(base.startswith("nvidia/cuda:13.0.") for base in bases)
    assert len({base.split(":")[1].split("-")[0] for base in bases}) == 1


@pytest.mark.parametrize("name", IMAGES)
def test_no_operator_is_compiled_into_an_image(name: str) -> None:
    """Trainings load none of DeepSpeed's (`forge_ray.gr.engine`)."""
    for _, words in instructions(name):
        assert "DS_BUILD_" not in words
        assert "-devel" not in words


@pytest.mark.parametrize("name", IMAGES)
def test_no_secret_and_nothing_from_the_network_by_add(name: str) -> None:
    for kind, words in instructions(name):
        assert kind != "ADD"
        assert kind not in ("ARG", "ENV") or not re.search(
            r"(?i)token|secret|password|api_?key|credential", words
        )
        assert "curl" not in words
        assert not re.search(r"://", words)


@pytest.mark.parametrize("name", IMAGES)
def test_only_named_files_can_enter(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    sources = [
        source.removeprefix("./")
        for kind, words in instructions(name)
        if kind == "COPY" and not words.startswith("--from")
        for source in words.split()[:-1]
    ]
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("name", IMAGES)
def test_login_shells_find_the_commands(name: str) -> None:
    """Ray and KubeRay start by `bash --login`, which forgets the image's PATH."""
    text = " ".join(words for kind, words in instructions(name) if kind == "RUN")
    assert "/etc/profile.d/forge-ray.sh" in text
    for package in ("openssh-client", "rsync", "wget"):
        assert package in text.split()
