"""A submitted sweep reads and writes in its tree, its store and named folders only."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.launch.job_paths import check_paths, check_store, file_in_tree
from forge_ray.launch.working_tree import read_tree
from forge_ray.sweep.config import SweepConfig


def check(root: Path, store: str = "/shared/store", shared: tuple[str, ...] = (), **values) -> None:
    values = {"name": "s", "space": {"a": {"choice": [1]}}, **values}
    config = load_config(SweepConfig, values=values)
    check_paths(config, store=store, shared=shared, tree=read_tree(root))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data": "/etc"}, "data must lie in the store or a shared folder"),
        ({"data": "/shared/store-of-another"}, "data must lie in the store"),
        ({"data": "/shared/store/../../etc"}, "data must hold no '..'"),
        ({"data": "../other"}, "data must hold no '..'"),
        ({"data": "~/data"}, "data must hold no '..' and no '~'"),
        ({"gr": {"model": {"path": "/keys/id"}}}, "gr.model.path must lie"),
        ({"points": [{"sid.vectors.path": "/etc/x"}]}, r"points\[0\].sid.vectors.path must lie"),
        ({"space": {"a": {"choice": ["/etc/x"]}}}, r"space.a.choice\[0\] must lie"),
        ({"folder": "/home/me/sweeps"}, "folder must lie"),
        ({"folder": "sweeps"}, "folder must be absolute"),
        ({"storage": "sqlite:////etc/optuna.db"}, "storage must lie"),
        ({"storage": "sqlite:///optuna.db"}, "storage must be absolute"),
        ({"storage": "optuna.journal"}, "storage must be absolute"),
        ({"storage": "postgresql://u:hunter2@db/optuna"}, "storage must hold no password"),
        ({"trackers": {"tensorboard": {"folder": "tb"}}}, "trackers.tensorboard.folder must be"),
        ({"data": "raw"}, "data must be sent with the working tree"),
    ],
)
def test_a_path_that_leads_out_is_refused(tmp_path: Path, values, told) -> None:
    (tmp_path / ".gitignore").write_text("raw/\n")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "interactions.csv").write_text("x")
    with pytest.raises(ConfigError, match=told) as raised:
        check(tmp_path, **values)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "values",
    [
        {"data": "raw"},
        {"data": "beauty"},
        {"data": "/shared/store/dataset/x"},
        {"data": "/mnt/raw/beauty", "folder": "/mnt/raw/sweeps"},
        {"data": "s3://bucket/raw"},
        {"storage": "sqlite:////shared/store/optuna.db"},
        {"storage": "postgresql://u@db/optuna"},
        {"objectives": ["ItemNDCG@10", "ItemNDCG@10/tail"]},
        {"gr": {"model": {"name": "org/model"}}},
    ],
)
def test_what_stays_inside_passes(tmp_path: Path, values) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "interactions.csv").write_text("x")
    check(tmp_path, shared=("/mnt/raw",), **values)


def test_a_remote_store_allows_no_folder_of_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder must lie"):
        check(tmp_path, store="s3://bucket/x", folder="/mnt/sweeps")
    check(tmp_path, store="s3://bucket/x", folder="/mnt/sweeps", shared=("/mnt",))


@pytest.mark.parametrize("folder", ["mnt", "/", "/../"])
def test_a_shared_folder_is_a_folder(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match="--shared must be an absolute folder"):
        check(tmp_path, shared=(folder,))


@pytest.mark.parametrize(
    "store", ["", "./forge-store", "../x", "/a/../b", "s3://key:secret@bucket"]
)
def test_a_store_must_be_seen_from_every_node(store: str) -> None:
    with pytest.raises(ConfigError, match="--store must"):
        check_store(store)


def test_a_sweep_file_lies_in_the_tree(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "sweeps").mkdir(parents=True)
    (root / "sweeps" / "s.yaml").write_text("x")
    (tmp_path / "out.yaml").write_text("x")
    (root / "link.yaml").symlink_to(tmp_path / "out.yaml")
    assert file_in_tree(Path("sweeps/s.yaml"), root) == "sweeps/s.yaml"
    assert file_in_tree(root / "sweeps" / "s.yaml", root) == "sweeps/s.yaml"
    for path in (Path("../out.yaml"), tmp_path / "out.yaml", Path("link.yaml")):
        with pytest.raises(ConfigError, match="the sweep file must lie below"):
            file_in_tree(path, root)
