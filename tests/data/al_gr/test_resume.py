"""An import or export that is cut off anywhere ends as one that was not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.artifacts import open_filesystem
from forge_ray.data.al_gr import exporting, importing
from forge_ray.data.al_gr.folder import AlGrFolder
from forge_ray.data.al_gr.importing import AlGrImportConfig
from forge_ray.data.al_gr.target import Target
from forge_ray.data.al_gr.text_files import Batch
from tests.data.al_gr import files


class CutOffError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(importing, "SHARD_BATCHES", 3)


def start(raw: Path, output: Path) -> dict[str, Any]:
    config = AlGrImportConfig(source=str(raw), output=str(output), version="final")
    source, folder = importing._find(config), AlGrFolder.at(str(output))
    settings = importing._join(folder, config, source)
    return {"folder": folder, "settings": settings, "source": source, "allow_pickle": False}


def import_one(arguments: dict[str, Any]) -> None:
    list(importing._import_file(0, **arguments))


def content(output: Path, part: str) -> pa.Table:
    shards = sorted((output / part).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in shards])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    rows = files.gr_rows(np.random.default_rng(0), 400)
    rows[50][2], rows[399][2] = "C1", "C2"
    rows.insert(200, ["one field"])
    path = tmp_path / "raw/gr.csv"
    return files.write_rows(path, [["system", "user", "answer"], *rows], final_eol=False).parent


@pytest.mark.parametrize("batches", [0, 1, 4, 9])
def test_an_import_goes_on_where_it_was_cut_off(
    raw: Path, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_one(start(raw, tmp_path / "whole"))
    arguments = start(raw, tmp_path / "cut")
    # A folder goes on with the blocks that its progress was counted in.
    monkeypatch.setattr(importing, "BLOCK_BYTES", 1 << 20)
    read = importing.read_text

    def cut_off(*args: Any, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(read(*args, **options)):
            if number == batches:
                raise CutOffError
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(importing, "read_text", cut_off)
        with pytest.raises(CutOffError):
            import_one(arguments)
    record = arguments["folder"].record(0)
    assert (record.batches if record else 0) == max(batches - 1, 0) // 3 * 3
    import_one(start(raw, tmp_path / "cut"))
    for part in ("gr", "rejects"):
        assert content(tmp_path / "cut", part).equals(content(tmp_path / "whole", part))
    whole = start(raw, tmp_path / "whole")["folder"].record(0)
    assert arguments["folder"].record(0).rows == whole.rows == {"gr": 398}
    assert arguments["folder"].record(0).skipped == {"broken_answer": 2, "wrong_columns": 1}


def test_an_export_goes_on_where_it_was_cut_off(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_one(start(raw, tmp_path / "in"))
    folder = AlGrFolder.at(str(tmp_path / "in"))
    settings, records = folder.finished()
    filesystem, _ = open_filesystem(str(tmp_path))

    def export_one(output: Path) -> bytes:
        target = Target(filesystem, str(output))
        arguments = {"settings": settings, "records": records, "target": target}
        list(exporting._export_file(0, folder=folder, **arguments))
        assert [path.name for path in output.iterdir()] == ["gr.csv"]
        return (output / "gr.csv").read_bytes()

    whole = export_one(tmp_path / "whole")
    remember, seen = exporting._remember, []

    def cut_off(target: Any, path: str, shards: int, size: int) -> None:
        remember(target, path, shards, size)
        seen.append(shards)
        if shards == 2:
            with open(path, "ab") as file:
                file.write(b"half a li")
            raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_remember", cut_off)
        with pytest.raises(CutOffError):
            export_one(tmp_path / "cut")
    assert seen == [1, 2]
    assert export_one(tmp_path / "cut") == whole
