from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest

from forge_ray.cli import console, main
from forge_ray.cli.console import emit
from forge_ray.launch.preflight_checks import check_storage
from tests.launch.test_preflight_checks import SOUND


def test_json_has_numbers_and_null_only(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"bits": float("nan"), "count": np.int64(3), "share": np.float32(0.5), "list": (1, 2)}
    emit([row], title="", as_json=True)
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert json.loads(text) == [{"bits": None, "count": 3, "share": 0.5, "list": [1, 2]}]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_printed_holds_no_password(capsys, as_json: bool) -> None:
    uri = "s3://reader:hunter2@shop/store"
    found = check_storage([dataclasses.replace(SOUND, storage=f"{uri}: Access Denied")], [uri])
    sound = check_storage([SOUND], [uri])
    rows = [{**dataclasses.asdict(one), "places": [{"uri": uri}]} for one in (found, sound)]
    for shown in (rows, rows[0]):
        emit(shown, title="2 checks", as_json=as_json)
        said = "".join(capsys.readouterr().out.split())
        assert "hunter2" not in said
        assert "s3://reader:***@shop/store" in said
    console.stderr.print(f"stored at {uri}")
    assert "hunter2" not in "".join(capsys.readouterr().err.split())


def test_passwords_reach_neither_log_nor_error(monkeypatch, capsys) -> None:
    uri = "s3://reader:hunter2@shop/store?scheme=http&secret_key=abc"
    formatter = console._Masking("%(message)s")
    record = logging.makeLogRecord({"msg": "published %s", "args": (uri,)})
    assert formatter.format(record) == (
        "published s3://reader:***@shop/store?scheme=http&secret_key=***"
    )
    monkeypatch.setattr("sys.argv", ["forge-ray", "artifacts", "ls", "--store", f"{uri}&x=1"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "must be a path or a URI" in said
    assert "hunter2" not in said
