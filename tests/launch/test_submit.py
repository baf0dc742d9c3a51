"""What is sent, under which name, and when nothing is. `e2e/test_jobs.py` has the cluster."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.image_uri import ContainerPlugin
from ray.runtime_env import RuntimeEnv

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.launch.jobs import Cluster, JobRecord
from forge_ray.launch.submit import (
    NOT_SPOT,
    JobPlan,
    Standing,
    SubmitOptions,
    decide,
    make_runtime_env,
    plan_job,
    read_requirements,
    submit_job,
)

SWEEP = """
name: my sweep
space: {sid.quantizer.codebook_size: {choice: [32, 64]}}
num_trials: 2
"""
STORE = "/shared/store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.yaml").write_text(SWEEP)
    return tmp_path


def plan(root: Path, *overrides: str, **options: Any) -> JobPlan:
    asked = SubmitOptions(**{"store": STORE, "root": root, **options})
    return plan_job(Path("sweeps/s.yaml"), overrides, asked)


def job(plan: JobPlan, attempt: int, status: str, **said: str) -> JobRecord:
    return JobRecord(
        job_id=f"{plan.prefix}-{attempt}",
        status=status,
        started_s=float(attempt),
        said={**plan.metadata, **said},
    )


def test_a_job_is_named_after_the_sweep_and_what_it_means(root: Path) -> None:
    first = plan(root)
    assert first.prefix.startswith("my-sweep-")
    assert len(first.prefix) == len("my-sweep-") + 8
    assert plan(root).prefix == first.prefix
    (root / "sweeps" / "s.yaml").write_text(f"# a remark\n{SWEEP}")
    assert plan(root, driver_cpus=0.0).prefix == first.prefix
    assert plan(root, store=f"{STORE}/").prefix == first.prefix
    others = [plan(root, "num_trials=3"), plan(root, store="/shared/other")]
    assert len({first.prefix, *(one.prefix for one in others)}) == 3


def test_the_command_keeps_its_words(root: Path) -> None:
    words = ["space={sid.quantizer.levels: {int: [2, 3]}}", "name=a b"]
    command = shlex.split(plan(root, *words).entrypoint)
    assert command[:5] == ["python", "-m", "forge_ray", "sweep", "run"]
    assert command[5:] == ["sweeps/s.yaml", *words, "--store", STORE]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["nmae=x"], "nmae must be a known key"),
        (["gr.max_stepz=3"], "max_stepz must be a known key"),
        (["space={sid.quantizer.codebook_size: {choice: [0]}}"], "codebook_size"),
        (["data=/etc"], "data must lie"),
    ],
)
def test_a_sweep_that_cannot_run_is_not_planned(root: Path, overrides, told) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(root, *overrides)


def test_a_remote_store_needs_a_folder(root: Path) -> None:
    with pytest.raises(ConfigError, match="folder must be set"):
        plan(root, store="s3://bucket/x")


def test_a_sweep_file_that_stays_here_is_refused(root: Path) -> None:
    (root / ".gitignore").write_text("sweeps/\n")
    with pytest.raises(ConfigError, match="the sweep file must be sent"):
        plan(root)


def test_a_store_in_the_tree_does_not_travel(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "artifact").write_text("x")
    found = plan(root, store=str(root / "mine"))
    assert found.tree is not None
    assert list(found.tree.sizes) == ["sweeps/s.yaml"]


@pytest.mark.parametrize(
    ("states", "again", "standing", "attempt"),
    [
        ([], False, Standing.SENT, 1),
        (["PENDING"], False, Standing.RUNNING, 1),
        (["RUNNING"], True, Standing.RUNNING, 1),
        (["FAILED"], False, Standing.SENT, 2),
        (["STOPPED", "FAILED"], False, Standing.SENT, 3),
        (["FAILED", "RUNNING"], False, Standing.RUNNING, 2),
        (["FAILED", "SUCCEEDED"], False, Standing.FINISHED, 2),
        (["FAILED", "SUCCEEDED"], True, Standing.SENT, 3),
        (["SUCCEEDED", "FAILED"], False, Standing.SENT, 3),
    ],
)
def test_what_a_submission_means(root: Path, states, again, standing, attempt) -> None:
    wanted = plan(root)
    jobs = [job(wanted, number + 1, state) for number, state in enumerate(states)]
    found = decide(jobs, wanted, again=again)
    assert (found.standing, found.job_id) == (standing, f"{wanted.prefix}-{attempt}")


def test_the_tenth_attempt_follows_the_ninth(root: Path) -> None:
    wanted = plan(root)
    jobs = [job(wanted, number, "FAILED") for number in (10, 9, 1)]
    assert decide(jobs, wanted).job_id == f"{wanted.prefix}-11"


def test_another_tree_is_told(root: Path) -> None:
    wanted = plan(root)
    running = [job(wanted, 1, "RUNNING", tree="abc")]
    assert decide(running, wanted, tree="abc").is_same_tree
    assert not decide(running, wanted, tree="def").is_same_tree


def test_one_sweep_runs_once_at_a_time(root: Path) -> None:
    running = job(plan(root), 1, "RUNNING")
    changed = plan(root, "num_trials=3")
    with pytest.raises(ConfigError, match=rf"got {running.job_id} running with other settings"):
        decide([running], changed)
    elsewhere = plan(root, store="/shared/other")
    assert decide([running], elsewhere).standing is Standing.SENT
    ended = dataclasses.replace(running, status="FAILED")
    assert decide([ended], changed).job_id == f"{changed.prefix}-1"


class Client:
    """Stands in for Ray's: knows jobs, remembers what was sent."""

    def __init__(self, jobs: list[JobRecord], *, is_late: bool = False) -> None:
        self.jobs, self.is_late, self.sent = jobs, is_late, {}
        self.error: Exception | None = None

    def submit_job(self, **given: Any) -> str:
        if self.error:
            raise self.error
        self.sent = given
        given["archive"] = Path(given["runtime_env"]["working_dir"]).read_bytes()
        if self.is_late:
            self.is_late = False
            self.jobs.append(
                JobRecord(job_id=given["submission_id"], status="RUNNING", said=given["metadata"])
            )
            raise RuntimeError("Job already exists")
        return str(given["submission_id"])


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    monkeypatch.setattr("forge_ray.launch.submit.our_jobs", lambda one: one.client.jobs)
    client = Client([])
    return cast(Cluster, SimpleNamespace(address="http://x", client=client))


def test_what_is_sent(root: Path, cluster) -> None:
    found = submit_job(cluster, plan(root, env=["A=1"]))
    sent = cluster.client.sent
    assert found.standing is Standing.SENT
    assert sent["submission_id"] == found.job_id
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_label_selector"]) == (1.0, NOT_SPOT)
    assert sent["runtime_env"]["env_vars"]["A"] == "1"
    assert sent["archive"].startswith(b"PK")
    assert all(isinstance(one, str) for one in sent["metadata"].values())


def test_nothing_is_sent_where_it_runs(root: Path, cluster) -> None:
    wanted = plan(root)
    cluster.client.jobs.append(job(wanted, 1, "RUNNING"))
    assert submit_job(cluster, wanted).standing is Standing.RUNNING
    assert cluster.client.sent == {}


def test_two_submitters_at_once_share_one_job(root: Path, cluster) -> None:
    cluster.client.is_late = True
    found = submit_job(cluster, plan(root))
    assert (found.standing, found.is_same_tree) == (Standing.RUNNING, True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Request failed with status code 500: no space"), "got: Request failed"),
        (ConnectionResetError("reset by peer"), "must answer, got: reset by peer"),
    ],
)
def test_a_refused_job_is_told(root: Path, cluster, error, told) -> None:
    cluster.client.error = error
    with pytest.raises(ClusterError, match=told):
        submit_job(cluster, plan(root))


def environment(**options: Any) -> dict[str, Any]:
    return make_runtime_env(SubmitOptions(**{"store": STORE, **options}))


def test_the_default_environment_is_the_clusters() -> None:
    assert set(environment()) == {"env_vars"}


def test_packages_are_pinned(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# mine\npolars==1.2.3  # why\n\nruff===0.1\n")
    assert read_requirements(path) == ["polars==1.2.3", "ruff===0.1"]
    for line in ("polars", "polars>=1", "polars==1.*", "-r other.txt", "--index-url http://x"):
        path.write_text(line)
        with pytest.raises(ConfigError, match="--pip must hold lines name==version"):
            read_requirements(path)
    with pytest.raises(ConfigError, match="--pip must be a requirements file"):
        read_requirements(tmp_path / "none.txt")


@pytest.mark.parametrize("image", ["repo/image:1.2", "host:5000/image@sha256:abc"])
def test_an_image_replaces_the_tree(root: Path, image: str) -> None:
    found = plan(root, image=image)
    assert found.tree is None
    assert found.runtime_env["container"]["image"] == image
    assert found.runtime_env["config"]["setup_timeout_seconds"] == 1800


def test_a_container_sees_the_store_and_the_shared_folders(root: Path) -> None:
    shared = ("/mnt/raw data", "/shared/store/more")
    folder = "folder='/mnt/raw data/sweeps'"
    found = plan(root, folder, image="image:1", store="/shared/store/", shared=shared)
    plugin, context = ContainerPlugin("/tmp/ray"), RuntimeEnvContext()
    plugin.worker_path = "worker.py"
    plugin.modify_context([], RuntimeEnv(**found.runtime_env), context, logging.getLogger("x"))
    words = shlex.split(context.py_executable)
    assert words[-1] == "image:1"
    mounts = {after for word, after in itertools.pairwise(words) if word == "-v"}
    # Beside those that Ray adds: its own folder, a token's file.
    assert {"/shared/store:/shared/store", "/mnt/raw data:/mnt/raw data"} <= mounts
    assert "/shared/store/more:/shared/store/more" not in mounts
    # A bucket is no folder; a path that podman would cut in two is refused.
    bucket = environment(image="image:1", shared=["/mnt/raw"], store="s3://bucket/x")
    assert bucket["container"]["run_options"] == ["-v", "/mnt/raw:/mnt/raw"]
    with pytest.raises(ConfigError, match="--store and --shared must hold no ':'"):
        environment(image="image:1", shared=["/mnt/a:b"])


@pytest.mark.parametrize("image", ["image", "image:latest", "host:5000/image"])
def test_an_image_is_pinned(image: str) -> None:
    with pytest.raises(ConfigError, match="--image must have a tag or digest"):
        environment(image=image)


def test_an_image_has_its_packages(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("a==1")
    with pytest.raises(ConfigError, match="--image and --pip must not be given together"):
        environment(image="image:1", requirements=tmp_path / "r.txt")


@pytest.mark.parametrize(
    "item",
    [
        *("MY_PASSWORD=hunter2", "WANDB_API_KEY=hunter2", "AWS_SECRET_ACCESS=hunter2"),
        *("DB_PWD=hunter2", "OPENAI_APIKEY=hunter2", "MY_PASSPHRASE=hunter2", "SSHPASS=hunter2"),
        "DATABASE_URL=postgresql://me:hunter2@db/shop",
        "MLFLOW_TRACKING_URI=https://me:hunter2@tracking",
        "ENDPOINT=https://host/?token=hunter2",
    ],
)
def test_no_secret_goes_into_a_job(item: str) -> None:
    with pytest.raises(ConfigError, match="--env must hold no secret") as raised:
        environment(env=[item])
    assert "hunter2" not in str(raised.value)
    assert item.partition("=")[0] in str(raised.value)


@pytest.mark.parametrize(
    "item", ["MLFLOW_TRACKING_URI=https://tracking", "PGPASSFILE=/etc/pgpass", "KEYBOARD=de"]
)
def test_what_holds_no_secret_goes(item: str) -> None:
    name, _, value = item.partition("=")
    assert environment(env=[item])["env_vars"][name] == value


def test_variables_have_a_name_and_a_value() -> None:
    assert environment(env=["A=b=c"])["env_vars"]["A"] == "b=c"
    for item in ("A", "=b", "a-b=c"):
        with pytest.raises(ConfigError, match="--env must be KEY=VALUE"):
            environment(env=[item])
