from __future__ import annotations

import multiprocessing
import pickle
import socket
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from typing import Any

import pytest

from forge_ray.errors import TrainingError
from forge_ray.sweep.bridge import SocketBridge, relay

ROWS = [{"global_step": step, "loss": 1.0 / step} for step in (1, 2, 3)]


def send(bridge: SocketBridge) -> None:
    for row in ROWS:
        bridge.after_report(None, [row, {"global_step": -1}], None)


def test_rows_of_another_process_arrive_in_order_before_the_result() -> None:
    def train(callbacks: Sequence[Any]) -> str:
        bridge = pickle.loads(pickle.dumps(callbacks[0]))
        child = multiprocessing.get_context("spawn").Process(target=send, args=(bridge,))
        child.start()
        child.join()
        return "model"

    seen: list[dict[str, Any]] = []
    assert relay(train, seen.append, required=("global_step", "loss")) == "model"
    assert seen == ROWS


def test_a_stranger_on_the_socket_is_ignored() -> None:
    seen: list[dict[str, Any]] = []

    def train(callbacks: Sequence[Any]) -> None:
        with pytest.raises(AuthenticationError):
            SocketBridge(callbacks[0]._address, b"wrong").after_report(None, [{}], None)
        with socket.create_connection(callbacks[0]._address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        send(callbacks[0])

    relay(train, seen.append, required=("global_step",))
    assert seen == ROWS


def test_errors_of_training_and_bad_rows_are_raised() -> None:
    def fails(callbacks: Sequence[Any]) -> None:
        send(callbacks[0])
        raise TrainingError("diverged")

    seen: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match="diverged"):
        relay(fails, seen.append, required=("global_step",))
    assert seen == ROWS
    with pytest.raises(TrainingError, match="must hold the number accuracy"):
        relay(lambda callbacks: send(callbacks[0]), seen.append, required=("accuracy",))
