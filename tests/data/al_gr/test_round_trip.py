"""Import and export of every AL-GR layout: what goes in comes out, and defects are counted."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from forge_ray.data.al_gr.exporting import export_al_gr
from forge_ray.data.al_gr.importing import AlGrImportConfig, AlGrReport, import_al_gr
from forge_ray.errors import ConfigError, DataError
from tests.data.al_gr import files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def run(source: Path, output: Path, **options: Any) -> AlGrReport:
    config = {"version": "final", "source": str(source), "output": str(output), **options}
    return import_al_gr(AlGrImportConfig(**config))


def rejects(output: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted((output / "rejects").glob("*"))
        for row in pq.read_table(path).to_pylist()
    ]


def write_all(folder: Path) -> int:
    """Every text layout and variant, without defects; returns the number of rows."""
    rng = np.random.default_rng(0)
    gr = ["system", "user", "answer"]
    train, test = files.gr_rows(rng, 50), files.gr_rows(rng, 40, answers="items")
    files.write_rows(folder / "s1_splits/part_01.csv", [gr, *train])
    files.write_rows(folder / "s1_test.csv", [gr, *test], eol="\r\n")
    with_id = [["id", *gr], *([f"row-{n}", *row] for n, row in enumerate(train))]
    files.write_rows(folder / "demo.csv", with_id, delimiter="\t", final_eol=False)
    search = [[s, f'查询 "5, inch C12" {u}', a] for s, u, a in train]
    files.write_rows(folder / "search.csv", [gr, *search])
    levels = ["codebook_lv1", "codebook_lv2", "codebook_lv3"]
    sids = [*files.item_sid_rows(rng, 30), ["empty", "", "7", ""]]
    files.write_rows(folder / "final_sid.csv", [["item_id", *levels], *sids])
    files.write_rows(folder / "tiny_sid.csv", [["base62_string", *levels], *sids], quoted=True)
    vectors = files.embedding_rows(rng, 20)
    files.write_rows(folder / "emb.csv", [["base62_string", "feature"], *vectors])
    sequences = [*files.sequence_rows(rng, 60), ["", "one;two"]]
    files.write_rows(
        folder / "origin/s2_tiny_test.csv", [["user_history", "target_item"], *sequences]
    )
    lines = [files.query_line(rng, number) for number in range(25)]
    (folder / "queries.txt").write_text("\n".join(lines))
    return 50 + 40 + 50 + 50 + 31 + 31 + 20 + 61 + 25


def test_text_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rows = write_all(raw)
    (raw / "README.md").write_text("not data")
    report = run(raw, tmp_path / "in")
    assert report.skipped == {}
    assert sum(report.rows.values()) == rows
    assert report.ignored == ["README.md"]
    back = export_al_gr(str(tmp_path / "in"), str(tmp_path / "out"))
    assert set(back.files) == set(report.files)
    for name in report.files:
        assert (tmp_path / "out" / name).read_bytes() == (raw / name).read_bytes(), name


def test_a_history_is_read_oldest_first_and_codes_from_zero(tmp_path: Path) -> None:
    header = ["user_history", "target_item"]
    files.write_rows(tmp_path / "raw/o.csv", [header, ["new;mid;old", "x;y"]])
    row = [files.SYSTEM, f"{files.BEFORE}C1989C14585C22548{files.AFTER}", "C1442C14117C19114"]
    files.write_rows(tmp_path / "raw/g.csv", [["system", "user", "answer"], row])
    run(tmp_path / "raw", tmp_path / "in")
    (origin,) = pq.read_table(tmp_path / "in/sequences").to_pylist()
    assert origin == {"history": ["old", "mid", "new"], "targets": ["x", "y"]}
    (gr,) = pq.read_table(tmp_path / "in/gr").to_pylist()
    assert gr["history"] == [1989, 6393, 6164]
    assert gr["answer"] == [1442, 5925, 2730]


def test_planted_defects_are_skipped_counted_and_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = files.embedding_rows(rng, 2000, dim=8)
    vectors[3] = ["SFk9B", base64.b64encode(b"short").decode()]
    vectors[700] = ["stray", "*" + vectors[700][1][1:]]
    vectors[1999] = ["nan", files.feature(np.full(8, np.nan))]
    vectors[1000][0] = ""
    files.write_rows(tmp_path / "raw/emb.csv", [["item_id", "feature"], *vectors])
    gr = files.gr_rows(rng, 10)
    gr[2][1] = gr[2][1].replace("C", "C9", 1)
    gr[4][1] = f"{files.BEFORE}C1C2{files.AFTER}"
    gr[5][2] += files.sid(rng)
    gr[7][1] += files.sid(rng)
    gr.insert(9, ["lost"])
    files.write_rows(tmp_path / "raw/gr.csv", [["system", "user", "answer"], *gr])
    sids = [
        ["a", "1", "2", "3"],
        ["b", "8192", "0", "0"],
        ["c", "x", "0", "0"],
        ["", "1", "1", "1"],
    ]
    head = ["item_id", "codebook_lv1", "codebook_lv2", "codebook_lv3"]
    files.write_rows(tmp_path / "raw/sid.csv", [head, *sids])
    report = run(tmp_path / "raw", tmp_path / "in")
    assert report.skipped == {
        "wrong_length": 1,
        "bad_base64": 1,
        "not_finite": 1,
        "empty_item": 2,
        "broken_history": 3,
        "broken_answer": 1,
        "wrong_columns": 1,
        "broken_code": 2,
    }
    assert report.rows == {"gr": 6, "items": 1, "vectors/default": 1996}
    kept = {(row["file"], row["row"]): row for row in rejects(tmp_path / "in")}
    assert kept["emb.csv", 4]["id"] == "SFk9B"
    assert kept["emb.csv", 4]["text"] == ",".join(vectors[3])
    assert [row for name, row in kept if name == "emb.csv"] == [4, 701, 1001, 2000]
    assert [row for name, row in kept if name == "gr.csv"] == [3, 5, 6, 8, 10]
    # Nothing is lost: rows and rejects together are the file.
    back = export_al_gr(str(tmp_path / "in"), str(tmp_path / "out"))
    assert back.left_out == report.skipped
    lines = (tmp_path / "out/gr.csv").read_text().splitlines()
    for row in (10, 8, 6, 5, 3):
        kept_row = kept["gr.csv", row]
        at = row - sum(1 for n, r in kept if n == "gr.csv" and r < row)
        lines.insert(at, kept_row["text"])
    assert lines == (tmp_path / "raw/gr.csv").read_text().splitlines()


def test_blank_lines_are_counted_kept_and_decide_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    head, rows = ["system", "user", "answer"], files.gr_rows(rng, 3)
    path = files.write_rows(tmp_path / "raw/gr.csv", [head, *rows], eol="\r\n")
    first, *rest = path.read_bytes().split(b"\r\n")[:-1]
    path.write_bytes(b"\r\n".join([first, *[b""] * 9, *rest, b"   ", b"", b""]))
    report = run(tmp_path / "raw", tmp_path / "in")
    assert report.skipped == {"blank_line": 11}
    assert report.rows == {"gr": 3}
    assert "answer" in pq.read_table(tmp_path / "in/gr").column_names  # and no `answer_items`
    found = [(one["file"], one["row"], one["text"]) for one in rejects(tmp_path / "in")]
    assert found == [
        *(("gr.csv", row, "") for row in range(1, 10)), ("gr.csv", 13, "   "), ("gr.csv", 14, ""),
    ]  # fmt: skip
    back = export_al_gr(str(tmp_path / "in"), str(tmp_path / "out"))
    assert back.left_out == report.skipped
    assert (tmp_path / "out/gr.csv").read_bytes() == b"\r\n".join([first, *rest, b""])


@pytest.mark.parametrize("name", ["itemEncID", "itemEncId"])
def test_archives_come_back_with_equal_arrays(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(2)
    raw = tmp_path / "raw"
    raw.mkdir()
    files.write_pairs_npz(raw / "pairs.npz", rng, items=3000, name=name)
    ids = rng.permutation(2000)
    np.savez_compressed(raw / "rec.npz", ids=ids, embeds=rng.standard_normal((2000, 8)))
    with pytest.raises(DataError, match="float16 or float32"):
        run(raw, tmp_path / "bad", allow_pickle=True)
    np.savez(raw / "rec.npz", ids=ids, embeds=rng.standard_normal((2000, 8)).astype(np.float32))
    with pytest.raises(ConfigError, match="allow_pickle must be true"):
        run(raw, tmp_path / "in")
    report = run(raw, tmp_path / "in", allow_pickle=True)
    assert report.rows["vectors/pairs"] == 3000
    export_al_gr(str(tmp_path / "in"), str(tmp_path / "out"))
    for file in ("pairs.npz", "rec.npz"):
        with (
            np.load(raw / file, allow_pickle=True) as a,
            np.load(tmp_path / "out" / file, allow_pickle=True) as b,
        ):
            assert a.files == b.files
            for one in a.files:
                assert a[one].dtype == b[one].dtype
                assert (a[one] == b[one]).all() if a[one].ndim else a[one].item() == b[one].item()


def test_versions_do_not_mix(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    gr = [["system", "user", "answer"], *files.gr_rows(rng, 3)]
    files.write_rows(tmp_path / "base/gr.csv", gr)
    files.write_rows(tmp_path / "final/other.csv", gr)
    run(tmp_path / "base", tmp_path / "in", version="base")
    with pytest.raises(ConfigError, match="version must be base as that of the files"):
        run(tmp_path / "final", tmp_path / "in", version="final")
    with pytest.raises(ConfigError, match="version must be base or final, got none"):
        run(tmp_path / "final", tmp_path / "other", version="")
    emb = [["item_id", "feature"], *files.embedding_rows(rng, 3)]
    files.write_rows(tmp_path / "emb/e.csv", emb)
    with pytest.raises(ConfigError, match="published no vectors of the base"):
        run(tmp_path / "emb", tmp_path / "in", version="base")
    assert json.loads((tmp_path / "in/al-gr.json").read_text())["version"] == "base"


def test_new_files_join_and_changed_ones_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    head = ["user_history", "target_item"]
    files.write_rows(tmp_path / "raw/a.csv", [head, *files.sequence_rows(rng, 5)])
    run(tmp_path / "raw", tmp_path / "in")
    files.write_rows(tmp_path / "raw/0.csv", [head, *files.sequence_rows(rng, 7)])
    assert run(tmp_path / "raw", tmp_path / "in").rows == {"sequences": 12}
    files.write_rows(tmp_path / "raw/a.csv", [head, *files.sequence_rows(rng, 6)])
    with pytest.raises(DataError, match=r"a.csv must be the file that .* was begun with"):
        run(tmp_path / "raw", tmp_path / "in")


def test_the_published_sample_comes_back(shared_data: Path, tmp_path: Path) -> None:
    sample = shared_data / "al-gr-sample"
    report = run(sample, tmp_path / "in")
    assert report.rows == {"gr": 10}
    assert report.skipped == {}
    assert report.ignored == ["LICENSE"]
    export_al_gr(str(tmp_path / "in"), str(tmp_path / "out"))
    name = "train_data.csv"
    assert (tmp_path / "out" / name).read_bytes() == (sample / name).read_bytes()


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"got \['x.csv'\]"):
        run(tmp_path / "raw", tmp_path / "in")


def test_archives_of_something_else_are_passed_over_and_broken_ones_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    files.write_pairs_npz(raw / "pairs.npz", np.random.default_rng(0), items=30, name="itemEncID")
    np.savez(raw / "other.npz", words=np.array(["a", None], dtype=object))
    (raw / "x.txt").write_text("nothing")
    report = run(raw, tmp_path / "in", allow_pickle=True)
    assert report.ignored == ["other.npz", "x.txt"]
    with np.load(raw / "pairs.npz", allow_pickle=True) as found:
        arrays = dict(found)
    np.savez(raw / "pairs.npz", **{**arrays, "pairs": np.array([[0, 30]])})
    with pytest.raises(DataError, match=r"pairs\.npz: pairs must be rows of embeds, 0 to 29"):
        run(raw, tmp_path / "beyond", allow_pickle=True)
    ids = np.array(["a", "b"], dtype=object)
    np.savez(raw / "strings.npz", ids=ids, embeds=np.zeros((2, 4), np.float32))
    (raw / "pairs.npz").unlink()
    with pytest.raises(DataError, match=r"strings\.npz must"):
        run(raw, tmp_path / "strings")
    (raw / "strings.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"strings\.npz must be a complete \.npz file"):
        run(raw, tmp_path / "short")


def test_vectors_of_no_length_are_named(tmp_path: Path) -> None:
    files.write_rows(tmp_path / "raw/emb.csv", [["item_id", "feature"], ["a", "xyz"], ["b", "q"]])
    with pytest.raises(DataError, match="feature must be base64 of float32 numbers"):
        run(tmp_path / "raw", tmp_path / "in")
