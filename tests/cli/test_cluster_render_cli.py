"""`forge-ray cluster render`, as a user meets it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from forge_ray.cli.cluster import app
from forge_ray.errors import ConfigError
from tests.launch.render.schemas import documents


def render(*words: str) -> Result:
    return CliRunner().invoke(app, ["render", *words], env={"COLUMNS": "160"})


def test_files_are_written_and_what_is_left_to_set_is_said(tmp_path: Path) -> None:
    done = render("--provider", "gcp", "name=shop", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    assert "still examples, set them before you start: image, nfs, project" in done.stderr
    assert 'cluster_name: "shop"' in (tmp_path / "out/gcp.yaml").read_text()
    assert (tmp_path / "out/gcp-roles/head.yaml").is_file()


def test_without_a_folder_all_files_are_one_stream() -> None:
    streamed = render("--provider", "kuberay")
    kinds = [one["kind"] for one in documents(streamed.stdout)]
    assert kinds[0] == "Namespace"
    assert kinds[-2:] == ["RayCluster", "RayJob"]


def test_settings_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("name: shop\nidentity: {iam.gke.io/gcp-service-account: a@b.iam}\n")
    text = render("--provider", "kuberay", "-c", str(file), "namespace=other").stdout
    assert '"iam.gke.io/gcp-service-account": "a@b.iam"' in text
    assert 'name: shop-worker\n  namespace: "other"' in text


def test_wrong_words_are_refused() -> None:
    for words, message in (
        (("--provider", "azure"), "--provider must be one of aws, gcp, kuberay, got 'azure'"),
        (("--provider", "aws", "gpus=3"), "gpus must be a known key"),
    ):
        error = render(*words).exception
        assert isinstance(error, ConfigError)
        assert message in str(error)
