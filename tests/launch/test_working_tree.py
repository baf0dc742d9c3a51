"""What travels with a job: ignore files as git reads them, links, sizes, the archive."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError
from forge_ray.launch import working_tree
from forge_ray.launch.working_tree import read_tree, write_archive


def make(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_what_git_ignores_stays_here(tmp_path: Path) -> None:
    names = ["a.py", "sweeps/s.yaml", "out/x", "keep/out/y", "n/a.log", "n/b.log", "n/sub/c.log"]
    make(tmp_path, dict.fromkeys(names, "x"))
    make(tmp_path, {".gitignore": "/out/\n*.log\n", "n/.gitignore": "!b.log\n/sub/\n"})
    assert list(read_tree(tmp_path).sizes) == [
        ".gitignore",
        "a.py",
        "keep/out/y",
        "n/.gitignore",
        "n/b.log",
        "sweeps/s.yaml",
    ]
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    asked = [*git, "ls-files", "--others", "--exclude-standard"]
    known = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert list(read_tree(tmp_path).sizes) == sorted(known)


@pytest.mark.parametrize(
    "name",
    [
        *(
            ".git/config",
            ".venv/bin/python",
            "forge-store/data/x",
            "forge-runs/x",
            "a/__pycache__/b",
        ),
        *(".env", "deploy/.env.prod", "certs/key.pem", ".netrc", "a.pyc"),
        *(".ssh/config", "keys/id_ecdsa", "id_dsa", "tls/server.key", ".git-credentials"),
        *("home/.pypirc", ".npmrc", ".docker/config.json", ".ray/auth_token"),
        *("home/.config/gcloud/access_tokens.db", ".aws/credentials"),
    ],
)
def test_some_things_never_travel(tmp_path: Path, name: str) -> None:
    make(tmp_path, {name: "x", "kept.py": "x"})
    assert list(read_tree(tmp_path).sizes) == ["kept.py"]


def test_more_can_be_left_out(tmp_path: Path) -> None:
    make(tmp_path, {"a.bin": "x", "b.py": "x", "notes/c.md": "x"})
    assert list(read_tree(tmp_path, exclude=["*.bin", "/notes/"]).sizes) == ["b.py"]


def test_too_large_a_tree_names_its_largest_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(working_tree, "MAX_BYTES", 1000)
    make(tmp_path, {"small": "x", "data/large": "x" * 700, "data/larger": "x" * 900})
    with pytest.raises(ConfigError, match=r"the largest: data/larger .*, data/large .*, small"):
        read_tree(tmp_path)
    assert read_tree(tmp_path, exclude=["larger"]).num_bytes == 701


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    make(root, {"real/a.txt": "x"})
    make(tmp_path, {"secret": "x"})
    (root / "inside").symlink_to(root / "real")
    (root / "nowhere").symlink_to(tmp_path / "gone")
    assert list(read_tree(root).sizes) == ["inside/a.txt", "real/a.txt"]
    (root / "leak").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"^leak must stay inside"):
        read_tree(root)
    assert "leak" not in read_tree(root, exclude=["leak"]).sizes


def test_links_do_not_take_along_what_stays_here(tmp_path: Path) -> None:
    make(tmp_path, {".env": "x", "real/kept.py": "x", "real/deep/secret": "x", "out/a": "x"})
    make(tmp_path, {".gitignore": "/out/\n/real/deep/secret\n"})
    (tmp_path / "settings").symlink_to(tmp_path / ".env")
    (tmp_path / "twice").symlink_to("settings")
    (tmp_path / "again").symlink_to("real")
    (tmp_path / "results").symlink_to("out")
    (tmp_path / "result").symlink_to("out/a")
    assert list(read_tree(tmp_path).sizes) == [".gitignore", "again/kept.py", "real/kept.py"]


def test_ignore_files_above_count_up_to_the_repository(tmp_path: Path) -> None:
    root = tmp_path / "repository" / "part"
    make(root, {"a.py": "x", "b.log": "x", "keys/x": "x"})
    make(tmp_path, {".gitignore": "*.py\n", "repository/.gitignore": "*.log\n/part/keys/\n"})
    assert len(read_tree(root).sizes) == 3
    subprocess.run(["git", "-C", str(root.parent), "init", "-q"], check=True)
    assert list(read_tree(root).sizes) == ["a.py"]


def test_links_of_two_folders_to_each_other_are_told(tmp_path: Path) -> None:
    make(tmp_path, {"a/x": "1", "c/y": "2"})
    (tmp_path / "a" / "b").symlink_to("../c")
    assert list(read_tree(tmp_path).sizes) == ["a/b/y", "a/x", "c/y"]
    (tmp_path / "c" / "d").symlink_to("../a")
    with pytest.raises(ConfigError, match=r"(a/b/d|c/d/b) must not lead to a folder around it"):
        read_tree(tmp_path)
    (tmp_path / "c" / "d").unlink()
    (tmp_path / "round").symlink_to("round")
    assert "round" not in read_tree(tmp_path).sizes


@pytest.mark.parametrize("target", [".", "real"])
def test_links_may_not_turn_in_circles(tmp_path: Path, target: str) -> None:
    make(tmp_path, {"real/a.txt": "x"})
    (tmp_path / "real" / "round").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="must not lead to a folder around it"):
        read_tree(tmp_path)


def test_an_archive_depends_on_content_alone(tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        make(tmp_path / name, {"b/c.py": "1", "a.py": "2"})
        if name == "second":
            os.utime(tmp_path / name / "a.py", (1e9, 1e9))
        digests.append(write_archive(read_tree(tmp_path / name), tmp_path / f"{name}.zip"))
    assert digests[0] == digests[1]
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert archive.namelist() == ["a.py", "b/c.py"]
        assert archive.read("b/c.py") == b"1"
    make(tmp_path / "second", {"a.py": "3"})
    again = write_archive(read_tree(tmp_path / "second"), tmp_path / "third.zip")
    assert again != digests[0]


def test_a_tree_knows_files_and_folders(tmp_path: Path) -> None:
    make(tmp_path, {"data/a.csv": "x"})
    tree = read_tree(tmp_path)
    assert [tree.holds(name) for name in ("data", "data/a.csv", ".", "dat", "b")] == [
        *(True, True, True, False, False)
    ]
