"""`forge-ray cluster …`: sweeps as jobs of a Ray cluster; larger commands in files beside this."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge_ray.cli import cluster_doctor, cluster_render
from forge_ray.cli.console import AsJson, Overrides, Verbose, emit, stderr
from forge_ray.config import load_config
from forge_ray.launch.jobs import (
    Cluster,
    JobRecord,
    find_job,
    follow_job,
    open_cluster,
    our_jobs,
    read_log,
    stop_job,
)

if TYPE_CHECKING:
    from forge_ray.launch.submit import Submission

app = typer.Typer(no_args_is_help=True, help="Make and check clusters, submit sweeps to them.")
app.command("render")(cluster_render.render)
app.command("doctor")(cluster_doctor.doctor)

Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard."
    ),
]
JobName = Annotated[
    str, typer.Argument(help="Submission id, or a sweep (its name or file): its newest job.")
]
SharedStore = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="FORGE_RAY_STORE",
        help="Artifact store that every node sees: a URI or an absolute path.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Files that stay here, spelled as in .gitignore."),
]
Shared = Annotated[
    list[str] | None,
    typer.Option("--shared", help="One more folder of the cluster that the sweep may use."),
]
Image = Annotated[
    str,
    typer.Option(
        "--image", help="Container image for the job; it holds the sweep file, nothing is sent."
    ),
]
Env = Annotated[
    list[str] | None, typer.Option("--env", help="KEY=VALUE of the job and its workers.")
]
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_INTERRUPTED = 130


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Sweep definition below the current folder.")],
    store: SharedStore,
    overrides: Overrides = None,
    address: Address = DEFAULT_ADDRESS,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the log; exit code 1 unless the job succeeds.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also where it has finished: tries failed trials again.")
    ] = False,
    exclude: Exclude = None,
    shared: Shared = None,
    requirements: Annotated[
        Path | None, typer.Option("--pip", help="File of lines name==version for the job.")
    ] = None,
    image: Image = "",
    env: Env = None,
    driver_cpus: Annotated[
        float, typer.Option("--driver-cpus", min=0, help="CPUs that the sweep's driver holds.")
    ] = 1.0,
    verbose: Verbose = False,
) -> None:
    """Send the current folder and a sweep to a cluster; the same command continues it.

    Prints the submission id, with --wait the job's log instead. A sweep that runs already is not
    sent again.
    """
    # Imports torch, which looking at jobs does without.
    from forge_ray.launch.submit import Standing, SubmitOptions, plan_job, submit_job

    options = SubmitOptions(
        store=store,
        exclude=exclude or (),
        shared=shared or (),
        requirements=requirements,
        image=image,
        env=env or (),
        driver_cpus=driver_cpus,
    )
    plan = plan_job(file, overrides or (), options)
    cluster = _open(address)
    found = submit_job(cluster, plan, again=again)
    _say(found)
    if not wait:
        sys.stdout.write(f"{found.job_id}\n")
    elif found.standing is not Standing.FINISHED:
        _follow(cluster, found.job_id)


@app.command()
def logs(
    job: JobName,
    address: Address = DEFAULT_ADDRESS,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Until the job ends; exit code 1 unless it succeeds."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Print what a sweep's driver has said."""
    cluster = _open(address)
    job_id = find_job(cluster, _name(job)).job_id
    if follow:
        _follow(cluster, job_id)
    else:
        _write(read_log(cluster, job_id))


@app.command()
def status(
    job: Annotated[
        str, typer.Argument(help="Submission id, or a sweep; without one, all sweeps.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show how a submission stands; `forge-ray sweep status` shows its trials."""
    if not job:
        list_jobs(address=address, as_json=as_json)
        return
    cluster = _open(address)
    found = find_job(cluster, _name(job))
    emit(_row(found), title=found.job_id, as_json=as_json)


@app.command("list")
def list_jobs(
    address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, verbose: Verbose = False
) -> None:
    """List the sweeps that were submitted to a cluster, the newest last."""
    cluster = _open(address)
    names = ("id", "status", "started", "took", "store")
    rows = [{name: _row(one)[name] for name in names} for one in our_jobs(cluster)]
    if not rows and not as_json:
        _tell(f"no sweep was submitted to {cluster.address}")
        return
    emit(rows, title=f"sweeps on {cluster.address}", as_json=as_json)


@app.command()
def stop(job: JobName, address: Address = DEFAULT_ADDRESS, verbose: Verbose = False) -> None:
    """End a sweep's job as Ctrl-C would; submitting it continues from the last checkpoints."""
    cluster = _open(address)
    found = find_job(cluster, _name(job))
    if found.is_over:
        _tell(f"{found.job_id} had ended: {found.status}")
        return
    _tell(f"stopping {found.job_id} …")
    _tell(f"{found.job_id}: {stop_job(cluster, found.job_id).status}")


def _open(address: str) -> Cluster:
    cluster = open_cluster(address)
    for line in cluster.warnings:
        stderr.print(f"[yellow]warning:[/] {line}", soft_wrap=True, highlight=False)
    return cluster


def _name(job: str) -> str:
    """The id or the name as given; a sweep file stands for its name."""
    from forge_ray.sweep.config import SweepConfig

    is_file = job.endswith((".yaml", ".yml"))
    return load_config(SweepConfig, path=job).name if is_file else job


def _say(found: Submission) -> None:
    lines = {
        "submitted": f"submitted {found.job_id} (see forge-ray cluster logs {found.job_id} -f)",
        "running": f"{found.job_id} is running already; nothing was sent",
        "finished": f"{found.job_id} has finished; nothing was sent (--again sends it)",
    }
    _tell(lines[found.standing.value])
    if not found.is_same_tree:
        _tell("it has the working tree of its submission, which was another")


def _follow(cluster: Cluster, job_id: str) -> None:
    try:
        ended = follow_job(cluster, job_id, _write)
    except KeyboardInterrupt:
        _tell(f"{job_id} goes on; stop it: forge-ray cluster stop {job_id}")
        raise typer.Exit(_INTERRUPTED) from None
    if ended.exit_code is None and ended.reason:
        # The driver never ran: its log does not say why.
        _tell(ended.reason)
    if not ended.has_succeeded:
        _tell(f"{job_id}: {ended.status}; submitting it again continues")
        raise typer.Exit(1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    stderr.print(text, soft_wrap=True, highlight=False, markup=False)


def _row(job: JobRecord) -> dict[str, Any]:
    return {
        "id": job.job_id,
        "sweep": job.said.get("sweep", ""),
        "status": job.status,
        "reason": job.reason,
        "started": _moment(job.started_s),
        "took": _duration(job),
        "store": job.said.get("store", ""),
        "file": job.said.get("file", ""),
        "command": job.command,
        "node": job.node,
        "exit_code": job.exit_code,
    }


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _duration(job: JobRecord) -> str:
    if job.started_s is None:
        return ""
    end = job.ended_s or datetime.now(timezone.utc).timestamp()
    return str(timedelta(seconds=round(end - job.started_s)))
