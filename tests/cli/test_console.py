from __future__ import annotations

import json

import numpy as np
import pytest

from forge_ray.cli.console import emit


def test_json_has_numbers_and_null_only(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"bits": float("nan"), "count": np.int64(3), "share": np.float32(0.5), "list": (1, 2)}
    emit([row], title="", as_json=True)
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert json.loads(text) == [{"bits": None, "count": 3, "share": 0.5, "list": [1, 2]}]
