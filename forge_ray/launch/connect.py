"""Joining a Ray cluster, or starting one here, without its log flood.

Stages expect a running Ray and never start one themselves; the command line and the tests do it
through this module.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private import worker as ray_worker
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from forge_ray.errors import ClusterError
from forge_ray.launch.watch import watching

logger = logging.getLogger(__name__)

# Workers copy these from the driver. Ray Data's pause limit is off because a trainer that
# evaluates or writes a checkpoint legitimately stops consuming for longer than any fixed time.
_WORKER_ENV = {
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "-1",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Of a spot machine's notice: some clouds leave 15 seconds, and Ray looks every 5.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    # Read where `fit()` is called, which in a sweep is a trial's process: for the Train tab.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A task sees the GPUs that it asked for, also where those are none: devices are chosen by what
    # torch sees.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Read by Ray in this process, before it starts.
_DRIVER_ENV = {
    **_WORKER_ENV,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    # Rich draws our progress; Ray's own bars and tables would fight it.
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_STARTS = 3
_SLOW_START = "timed out during startup"
# ray.data configures its loggers when it is imported, hence the import above.
_NOISY = ("ray", "ray.data", "ray.train", "ray.tune", "deepspeed", "DeepSpeed", "optuna")


def connect(
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    dashboard: bool = True,
    verbose: bool = False,
) -> None:
    """Joins the Ray of `address`, or starts one on this machine; does nothing when connected.

    Args:
        address: Ray address; None reads RAY_ADDRESS and starts a local Ray where it is unset.
            `local` always starts one.
        num_cpus: CPUs of a local Ray; None counts those of the machine.
        dashboard: Whether a local Ray serves its dashboard (on localhost).
        verbose: Whether Ray's and the workers' own log lines reach this terminal.

    Raises:
        ClusterError: A local Ray did not start in time, though it was tried again.
    """
    for name, value in _DRIVER_ENV.items():
        os.environ.setdefault(name, value)
    quiet_logs(verbose=verbose)
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    is_local = address in (None, "", "local")
    options: dict[str, object] = {"address": "local" if is_local else address}
    if is_local:
        options |= {"num_cpus": num_cpus, "include_dashboard": dashboard}
    with closing_new(default_token_file()):
        _init(
            **options,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            runtime_env={"env_vars": _worker_env()},
        )
    if not verbose:
        # The raylet's notices go to standard output whatever `log_to_driver` says, and would stand
        # between the lines of `--json`. Private name: a test pins it.
        ray_worker.print_to_stdstream = _log_notice
    quiet_logs(verbose=verbose)


def _init(**options: Any) -> None:
    """`ray.init`, tried again where a busy machine starts a raylet slower than Ray waits."""
    for attempt in range(_STARTS):
        try:
            ray.init(**options)
            return
        except Exception as error:  # noqa: PERF203 - three tries at most
            # Ray waits half a minute, which nothing sets, and has no class for the end of it.
            if _SLOW_START not in str(error):
                raise
            ray.shutdown()
            if attempt + 1 == _STARTS:
                raise ClusterError(
                    f"Ray must start within 30 s on this machine, got none in {_STARTS} tries. "
                    "Is it very busy, or short of memory? Try again when it is less so, or join a "
                    "running Ray with RAY_ADDRESS."
                ) from error
            logger.warning("Ray did not start within 30 s on this busy machine; trying again")


def default_token_file() -> Path:
    """Where Ray keeps the token of clusters that it starts, unless RAY_AUTH_TOKEN_PATH says."""
    return Path(os.path.expanduser("~"), ".ray", "auth_token")


@contextmanager
def closing_new(path: Path) -> Iterator[None]:
    """Leaves a file that the block makes to its owner: Ray lets all users read a new token.

    Also where the block fails: the token stays for the next start.
    """
    is_old = path.exists()
    try:
        yield
    finally:
        if not is_old and path.exists():
            path.chmod(0o600)


def _worker_env() -> dict[str, str]:
    # Less what the job that we run in sets: Ray refuses a variable that both name.
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in _WORKER_ENV.items() if name not in given}


def _log_notice(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    logger.debug("%s: %s", data["pid"], "\n".join(data["lines"]))


def disconnect() -> None:
    """Leaves Ray; a Ray that `connect` started ends with it."""
    ray.shutdown()


@contextmanager
def connected(
    *, address: str | None = None, num_cpus: int | None = None, verbose: bool = False
) -> Iterator[None]:
    """`connect` for the length of a block; leaves a Ray alone that was there before."""
    was_connected = ray.is_initialized()
    connect(address=address, num_cpus=num_cpus, verbose=verbose)
    try:
        with watching():
            yield
    finally:
        if not was_connected:
            disconnect()


def quiet_logs(*, verbose: bool) -> None:
    """Lets only errors of the libraries underneath reach the terminal, unless verbose.

    Ray's log files keep everything.
    """
    level = logging.INFO if verbose else logging.ERROR
    for name in _NOISY:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(level)
        if not logger.handlers:
            logger.setLevel(level)
