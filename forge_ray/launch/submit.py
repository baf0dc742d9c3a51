"""A sweep as a job of a Ray cluster: checked here, sent once, continued by sending it again.

A job is named after the sweep, a hash of what it means, and an attempt. What a job runs is
`forge-ray sweep run`, which decides by itself whether it starts or continues.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from ray.runtime_env import RuntimeEnv

from forge_ray.config import canonical_json, load_config, to_mapping
from forge_ray.errors import ClusterError, ConfigError
from forge_ray.launch.job_paths import check_paths, check_store, disk_folders, file_in_tree
from forge_ray.launch.jobs import KIND, Cluster, JobRecord, answering, our_jobs
from forge_ray.launch.working_tree import WorkingTree, read_tree, write_archive
from forge_ray.secrets import masked
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.plan import quasi_random_points
from forge_ray.sweep.resolve import check_rungs, resolve_point
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.sweep import check_folder

NOT_SPOT = {"ray.io/market-type": "!spot"}
"""Where the driver may run; also matches nodes without the label."""
_STOPPING = {
    # Ctrl-C, which Tune turns into checkpoints and a clean end; Ray's own default is a kill in 3 s.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}
_SECRET = re.compile(
    r"(?i)password|passwd|passphrase|pwd|token|secret|credential"
    r"|pass($|_)|(^|_|api|access|private)keys?($|_)"
)
_CHECKED_POINTS = 64
_SETUP_S = 1800
"""Seconds for a node to pull an image, or to copy its Python environment and install packages."""


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What `forge-ray cluster submit` was asked."""

    store: str
    """Artifact store that the cluster sees."""
    root: Path = field(default_factory=Path.cwd)
    """Working tree to send."""
    exclude: Sequence[str] = ()
    """More patterns of files that stay here."""
    shared: Sequence[str] = ()
    """More folders of the cluster that the sweep may use."""
    requirements: Path | None = None
    """File of pinned requirements that the job installs."""
    image: str = ""
    """Container image that the job's processes run in; it holds the sweep file, nothing is sent. Of
    the nodes' disks they see the store and the shared folders."""
    env: Sequence[str] = ()
    """KEY=VALUE variables of the job and its workers."""
    driver_cpus: float = 1.0
    """CPUs that the driver holds."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A checked sweep, ready to be sent.

    Attributes:
        config: The resolved sweep file.
        entrypoint: The job's command.
        prefix: Submission id without the attempt.
        metadata: What the job says of itself.
        tree: What travels; None with an image.
        runtime_env: The job's environment, without the tree.
        driver_cpus: CPUs that the driver holds.
    """

    config: SweepConfig
    entrypoint: str
    prefix: str
    metadata: dict[str, str]
    tree: WorkingTree | None
    runtime_env: dict[str, Any]
    driver_cpus: float


class Standing(enum.Enum):
    """How a sweep stands on a cluster when it is submitted."""

    SENT = "submitted"
    """It was not running: sent now."""
    RUNNING = "running"
    """A job of it runs or waits; nothing was sent."""
    FINISHED = "finished"
    """A job of it succeeded; nothing was sent."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of a submission.

    Attributes:
        job_id: Ray's submission id.
        standing: Whether something was sent.
        is_same_tree: Whether the job has the files as they are here now.
    """

    job_id: str
    standing: Standing
    is_same_tree: bool = True


def plan_job(file: Path, overrides: Sequence[str], options: SubmitOptions) -> JobPlan:
    """Checks a sweep and lists what it needs; reaches no cluster.

    Raises:
        ConfigError: The sweep, a path, a requirement or the working tree breaks a rule.
    """
    config = load_config(SweepConfig, path=options.root / file, overrides=overrides)
    # A slash at its end is the same store, and the same job.
    options = replace(options, store=options.store.rstrip("/"))
    check_sweep(config, options.store)
    name = file_in_tree(file, options.root)
    tree = None if options.image else read_tree(options.root, exclude=_excludes(options))
    if tree is not None and not tree.holds(name):
        raise ConfigError(
            f"the sweep file must be sent with the working tree, got {name}, which is left out of "
            "it. Take it out of .gitignore or --exclude."
        )
    check_paths(config, store=options.store, shared=options.shared, tree=tree)
    words = ["python", "-m", "forge_ray", "sweep", "run", name, *overrides, "--store"]
    digest = config_digest(config, options.store)
    return JobPlan(
        config=config,
        entrypoint=shlex.join([*words, options.store]),
        prefix=f"{re.sub(r'[^A-Za-z0-9._]+', '-', config.name)}-{digest}",
        metadata={
            KIND: "sweep",
            "sweep": config.name,
            "config": digest,
            "store": options.store,
            "file": name,
        },
        tree=tree,
        runtime_env=make_runtime_env(options),
        driver_cpus=options.driver_cpus,
    )


def check_sweep(config: SweepConfig, store: str) -> None:
    """Refuses what the job would refuse, as far as it shows without the dataset.

    Raises:
        ConfigError: Store, space or a design is not valid.
    """
    check_store(store)
    check_folder(config, store)
    check_rungs(config)
    space = parse_space(config.space)
    is_grid = config.sampler.kind == "grid"
    drawn = space.grid() if is_grid else quasi_random_points(space, seed=config.sampler.seed)
    limit = min(_CHECKED_POINTS, config.num_trials or _CHECKED_POINTS)
    points = itertools.islice(drawn, limit) if space.parameters else ()
    for point in (*config.points, *points):
        resolve_point(config, point, dataset=_AnyCatalogue())


class _AnyCatalogue:
    """Stands in for a dataset that is not here: one item fits every design."""

    key = ""
    num_items = 1


def config_digest(config: SweepConfig, store: str) -> str:
    """Eight hex digits for a resolved sweep and where it keeps its memory."""
    meaning = canonical_json({"sweep": to_mapping(config), "store": store})
    return hashlib.sha256(meaning.encode()).hexdigest()[:8]


def submit_job(cluster: Cluster, plan: JobPlan, *, again: bool = False) -> Submission:
    """Sends a sweep unless a job of it runs, waits or has succeeded.

    Args:
        cluster: Where to.
        plan: The checked sweep.
        again: Sends it also where a job of it has succeeded.

    Raises:
        ConfigError: The same sweep runs with other settings.
        ClusterError: The cluster refuses the job.
    """
    with tempfile.TemporaryDirectory(prefix="forge-ray-") as folder:
        archive = Path(folder, "tree.zip")
        digest = write_archive(plan.tree, archive)[:12] if plan.tree else ""
        found = decide(our_jobs(cluster), plan, tree=digest, again=again)
        if found.standing is not Standing.SENT:
            return found
        environment = {**plan.runtime_env, **({"working_dir": str(archive)} if plan.tree else {})}
        try:
            with answering(cluster.address):
                cluster.client.submit_job(
                    entrypoint=plan.entrypoint,
                    submission_id=found.job_id,
                    runtime_env=environment,
                    metadata={**plan.metadata, "tree": digest},
                    entrypoint_num_cpus=plan.driver_cpus,
                    entrypoint_label_selector=NOT_SPOT,
                )
        except ClusterError:
            # Another submission of this attempt may have come first: then it is theirs that runs.
            now = decide(our_jobs(cluster), plan, tree=digest, again=again)
            if now.standing is Standing.SENT:
                raise
            return now
    return found


def decide(
    jobs: Sequence[JobRecord], plan: JobPlan, *, tree: str = "", again: bool = False
) -> Submission:
    """What a submission means, given the cluster's jobs of forge-ray, oldest first.

    Raises:
        ConfigError: The same sweep runs with other settings.
    """
    attempts = {number: one for one in jobs if (number := _attempt(one, plan.prefix))}
    last = max(attempts, default=0)
    if last and not (attempts[last].is_over and (again or not attempts[last].has_succeeded)):
        job = attempts[last]
        return Submission(
            job_id=job.job_id,
            standing=Standing.FINISHED if job.is_over else Standing.RUNNING,
            is_same_tree=job.said.get("tree", "") == tree,
        )
    _refuse_others(jobs, plan)
    return Submission(job_id=f"{plan.prefix}-{last + 1}", standing=Standing.SENT)


def _attempt(job: JobRecord, prefix: str) -> int:
    """Number of an attempt of this sweep; 0 where the job is another's."""
    head, _, number = job.job_id.rpartition("-")
    return int(number) if head == prefix and number.isdigit() else 0


def _refuse_others(jobs: Sequence[JobRecord], plan: JobPlan) -> None:
    for one in jobs:
        is_same = all(one.said.get(name) == plan.metadata[name] for name in ("sweep", "store"))
        if is_same and not one.is_over:
            raise ConfigError(
                f"sweep {plan.config.name!r} must run once at a time in {plan.metadata['store']}, "
                f"got {one.job_id} running with other settings. Wait for it, or stop it: "
                f"forge-ray cluster stop {one.job_id}"
            )


def make_runtime_env(options: SubmitOptions) -> dict[str, Any]:
    """The job's environment: variables, and pinned packages or an image; by default the cluster's.

    Raises:
        ConfigError: A variable holds a secret, or something is not pinned.
    """
    content: dict[str, Any] = {"env_vars": {**_STOPPING, **_variables(options.env)}}
    if options.image and options.requirements:
        raise ConfigError(
            f"--image and --pip must not be given together, got {options.image} and "
            f"{options.requirements}. Install the packages in the image."
        )
    if options.image:
        content["container"] = {
            "image": _pinned_image(options.image),
            "run_options": _mounts(disk_folders(options.store, options.shared)),
        }
    if options.requirements:
        content["pip"] = read_requirements(options.requirements)
    if options.image or options.requirements:
        content["config"] = {"setup_timeout_seconds": _SETUP_S}
    return dict(RuntimeEnv(**content))


def _excludes(options: SubmitOptions) -> list[str]:
    """Patterns of files that stay here; a store inside the tree is one."""
    root, found = options.root.resolve(), list(options.exclude)
    store = Path(options.store)
    if "://" not in options.store and store.resolve().is_relative_to(root):
        found.append(f"/{store.resolve().relative_to(root).as_posix()}/")
    return found


def _variables(items: Sequence[str]) -> dict[str, str]:
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env must be KEY=VALUE, got {item!r}. Write {name or 'KEY'}=….")
        if _SECRET.search(name) or masked(value) != value:
            where = name if _SECRET.search(name) else f"a password in the URL of {name}"
            raise ConfigError(
                f"--env must hold no secret, got {where}: whoever may see jobs sees it. Set it on "
                "the nodes, or in the pods from a Kubernetes secret."
            )
        found[name] = value
    return found


def _pinned_image(image: str) -> str:
    name = image.rpartition("/")[2]
    tag = name.partition(":")[2]
    if "@sha256:" not in name and tag in ("", "latest"):
        raise ConfigError(
            f"--image must have a tag or digest that stays, got {image!r}. Write {name}:1.2 or "
            f"{name.partition(':')[0]}@sha256:…."
        )
    return image


def _mounts(folders: Sequence[str]) -> list[str]:
    """Options that show a container these folders of its node, under the same paths.

    Ray's newer `image_uri` shows it none: the store would be a layer that goes with each process.
    """
    for folder in folders:
        if ":" in folder:
            raise ConfigError(
                f"--store and --shared must hold no ':' with --image, got {folder!r}. Mount the "
                "disk elsewhere, or start the cluster's nodes from the image."
            )
    # Ray joins the words into a line for a shell.
    return [word for one in folders for word in ("-v", shlex.quote(f"{one}:{one}"))]


def read_requirements(path: Path) -> list[str]:
    """The lines of a requirements file, each pinned to one version.

    Raises:
        ConfigError: The file is missing, or a line is no requirement of one version.
    """
    if not path.is_file():
        raise ConfigError(f"--pip must be a requirements file, got no file at {path}. Check it.")
    lines = [one.partition(" #")[0].strip() for one in path.read_text("utf-8").splitlines()]
    wanted = [one for one in lines if one and not one.startswith("#")]
    for line in wanted:
        if not _is_pinned(line):
            raise ConfigError(
                f"--pip must hold lines name==version, got {line!r} in {path}. Pin it, so that a "
                "later attempt runs the same code."
            )
    return wanted


def _is_pinned(line: str) -> bool:
    try:
        versions = list(Requirement(line).specifier)
    except InvalidRequirement:
        return False
    return any(one.operator in ("==", "===") and "*" not in one.version for one in versions)
