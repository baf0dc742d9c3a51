"""Joining Ray: idempotent, quiet, and with the settings that stages rely on."""

from __future__ import annotations

import inspect
import logging
import os

import pytest
import ray

from forge_ray.errors import ClusterError
from forge_ray.launch import connect as connect_module
from forge_ray.launch.connect import _worker_env, closing_new, connect, quiet_logs

pytestmark = pytest.mark.ray


def test_connect_again_keeps_the_running_ray(ray_local: None) -> None:
    before = ray.get_runtime_context().get_node_id()
    connect(address="local", num_cpus=1)
    assert ray.get_runtime_context().get_node_id() == before


def test_workers_get_their_threads_and_settings(ray_local: None) -> None:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")

    @ray.remote(num_cpus=1)
    def environment() -> dict[str, str]:
        import os

        return dict(os.environ)

    seen = ray.get(environment.remote())
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["OMP_WAIT_POLICY"] == "passive"
    assert seen["RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"] == "-1"
    assert seen["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
    # It asked for no GPU: on a machine with some it sees none of them.
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_quiet_hides_what_is_not_an_error(ray_local: None) -> None:
    logger = logging.getLogger("ray.data")
    terminal = [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]
    assert terminal
    quiet_logs(verbose=True)
    assert all(handler.level == logging.INFO for handler in terminal)
    quiet_logs(verbose=False)
    assert all(handler.level == logging.ERROR for handler in terminal)


def test_raylet_notices_do_not_reach_standard_output(ray_local, capsys) -> None:
    from ray._private import worker

    # What Ray itself calls for such a notice: the name must still exist, and print nothing.
    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names
    worker.print_to_stdstream({"lines": ["14 workers"], "pid": "raylet", "is_err": False}, False)
    assert capsys.readouterr().out == ""


def test_a_jobs_variables_are_left_to_it(monkeypatch) -> None:
    assert _worker_env()["OMP_WAIT_POLICY"] == "passive"
    job = '{"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "active"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    assert "OMP_WAIT_POLICY" not in _worker_env()
    assert _worker_env()["RAY_TRAIN_V2_ENABLED"] == "1"


def test_a_new_token_is_its_owners(tmp_path) -> None:
    made, known = tmp_path / "made", tmp_path / "known"
    known.write_text("x")
    modes = known.stat().st_mode
    for path in (made, known, tmp_path / "never"):
        with closing_new(path):
            if path is made:
                made.write_text("x")
    assert made.stat().st_mode & 0o777 == 0o600
    assert known.stat().st_mode == modes


def test_a_new_token_is_its_owners_where_the_start_fails(tmp_path) -> None:
    made = tmp_path / "made"

    def start() -> None:
        made.write_text("x")
        raise ClusterError("no start")

    with pytest.raises(ClusterError), closing_new(made):
        start()
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_slow_start_is_tried_again_and_then_named(monkeypatch, caplog) -> None:
    starts: list[dict[str, object]] = []

    def slow(**options: object) -> None:
        starts.append(options)
        if len(starts) < limit:
            raise Exception("The current node timed out during startup. This could happen …")

    monkeypatch.setattr("forge_ray.launch.connect.ray.init", slow)
    monkeypatch.setattr("forge_ray.launch.connect.ray.shutdown", lambda: None)
    limit = 3
    connect_module._init(address="local")
    assert len(starts) == 3
    starts.clear()
    limit = 9
    with pytest.raises(ClusterError, match=r"Ray must start within 30 s .* got none in 3 tries"):
        connect_module._init(address="local")
    monkeypatch.setattr("forge_ray.launch.connect._SLOW_START", "something else")
    with pytest.raises(Exception, match="timed out during startup"):
        connect_module._init(address="local")


def test_ray_still_says_it_like_this() -> None:
    source = inspect.getsource(ray._private.node.Node.__init__)
    assert connect_module._SLOW_START in source
