"""Query sets out of prepared datasets: splits, repeats, logs with planted defects."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data import tasks
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.queries import build
from forge_ray.data.queries.build import QueriesConfig, build_queries
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.queries.rows import asked_of
from forge_ray.data.queries.words import QueryMaker
from forge_ray.data.schema import SPLITS, Dataset
from forge_ray.data.sources import InteractionsConfig
from forge_ray.data.splits import TemporalConfig
from forge_ray.errors import ConfigError, DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
USERS, ITEMS = 40, 60


def interactions() -> list[tuple[str, str, int]]:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        taken = rng.permutation(ITEMS)[: rng.integers(4, 9)].tolist()
        rows += [(f"u{user}", f"i{item}", 100 * at) for at, item in enumerate(taken)]
    # One user takes an item again.
    again = ["i1", "i2", "i1", "i3", "i1"]
    return [*rows, *(("again", item, 10 * at) for at, item in enumerate(again))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dataset(
    store: ArtifactStore, tmp_path_factory: pytest.TempPathFactory, ray_local: None
) -> Dataset:
    folder = tmp_path_factory.mktemp("raw")
    write(folder / "interactions.csv", ("user_id", "item_id", "timestamp"), interactions())
    titles = [(f"i{item}", "" if item == 7 else f"Red Soap {item} (Big)") for item in range(ITEMS)]
    write(folder / "items.csv", ("item_id", "title"), titles)
    (found,) = prepare(PrepareConfig(source=str(folder), num_shards=3), store)
    return found


def write(path: Path, names: tuple[str, ...], rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([names, *rows])
    return path


def rows_of(queries: QuerySet, split: str) -> list[tuple[int, tuple[int, ...], int, str]]:
    found = []
    for batch in queries.batches(split):
        for row in range(len(batch)):
            items = tuple(batch.items.row(row).tolist())
            (target,) = batch.targets.row(row).tolist()
            found.append((int(batch.user_index[row]), items, target, batch.queries[row]))
    return sorted(found)


def sequences(dataset: Dataset) -> dict[int, list[int]]:
    """Whole sequences, train to test, by user."""
    found: dict[int, list[int]] = {}
    for batch in dataset.sequence_batches("test"):
        for row, user in enumerate(batch.user_index.tolist()):
            found[user] = [*batch.items.row(row).tolist(), *batch.targets.row(row).tolist()]
    return found


class TestMadeFromTexts:
    def test_every_interaction_asks_once_in_its_own_split(self, dataset, store):
        config = load_config(
            QueriesConfig, overrides=["repeats=keep", "max_history=2", "derive.typo_rate=0"]
        )
        queries = build_queries(config, dataset, store)
        assert queries.is_synthetic
        assert queries.name.endswith("-synthetic")
        nameless = int(np.flatnonzero(dataset.item_ids() == "i7")[0])
        expected = {split: [] for split in SPLITS}
        for user, items in sequences(dataset).items():
            for at, item in enumerate(items):
                split = {1: "test", 2: "validation"}.get(len(items) - at, "train")
                history = items[max(0, at - 2) : at] if split == "train" else items[:at]
                if item != nameless:
                    expected[split].append((user, tuple(history), item))
        for split in SPLITS:
            found = rows_of(queries, split)
            assert [row[:3] for row in found] == sorted(expected[split])
            numbers = {item: name[1:] for item, name in enumerate(dataset.item_ids())}
            for *_, item, query in found:
                assert set(query.split()) <= {"red", "soap", numbers[item]}
        counted = sum(len(rows) for rows in expected.values())
        total = sum(map(len, sequences(dataset).values()))
        assert queries.artifact.manifest.rows["no_text"] == total - counted

    def test_no_held_out_pair_is_in_training(self, dataset, store):
        kept = build_queries(QueriesConfig(repeats="keep"), dataset, store)
        queries = build_queries(QueriesConfig(), dataset, store)
        held_out = {row[2:] for split in SPLITS[1:] for row in rows_of(queries, split)}
        trained = rows_of(queries, "train")
        assert not held_out & {row[2:] for row in trained}
        assert trained == [row for row in rows_of(kept, "train") if row[2:] not in held_out]
        left_out = len(rows_of(kept, "train")) - len(trained)
        assert 0 < left_out == queries.artifact.manifest.rows["repeated_query"]

    @pytest.mark.parametrize("repeats", ["drop", "keep"])
    def test_the_rows_are_those_of_one_process_that_holds_everything(self, dataset, store, repeats):
        config = load_config(
            QueriesConfig, overrides=[f"repeats={repeats}", "derive.seed=3", "max_history=3"]
        )
        texts = dataset.items(["title"])["title"].to_pylist()
        maker = QueryMaker(texts, config.derive)
        expected: dict[str, list[tuple[int, tuple[int, ...], int, str]]] = {}
        wordless = 0
        for split in SPLITS:
            expected[split] = []
            for users in dataset.sequence_batches(split):
                asked = asked_of(users, split, max_history=3)
                for row, query in enumerate(maker.queries(asked.targets, asked.keys)):
                    wordless += not query
                    if query:
                        items = tuple(asked.items.row(row).tolist())
                        found = (int(asked.user_index[row]), items, int(asked.targets[row]), query)
                        expected[split].append(found)
        held_out = {row[2:] for split in SPLITS[1:] for row in expected[split]}
        trained = [row for row in expected["train"] if repeats == "keep" or row[2:] not in held_out]
        repeated = len(expected["train"]) - len(trained)
        assert (repeated > 0) == (repeats == "drop")
        queries = build_queries(config, dataset, store)
        for split in SPLITS:
            rows = trained if split == "train" else expected[split]
            assert rows_of(queries, split) == sorted(rows)
            assert queries.artifact.manifest.rows[split] == len(rows)
        counts = queries.artifact.manifest.rows
        assert counts["no_text"] == wordless > 0
        assert counts.get("repeated_query", 0) == repeated

    def test_the_driver_holds_neither_texts_nor_rows(self, dataset, store, monkeypatch):
        came: list[pa.Table] = []

        def watched(rows):
            for table in tables(rows):
                came.append(table)
                yield table

        tables = tasks.tables
        monkeypatch.setattr(tasks, "tables", watched)
        monkeypatch.setattr(Dataset, "items", None)  # of this process: workers have their own
        build_queries(load_config(QueriesConfig, overrides=["derive.seed=4"]), dataset, store)
        shards = len(dataset.sequence_files("train"))
        said = pa.concat_tables([one for one in came if one.num_rows])
        assert said["split"].drop_null().to_pylist() == ["train"] * shards
        assert said["pairs"].combine_chunks().flatten().to_pylist() == []

    def test_tasks_read_the_texts_where_they_lie(self, dataset):
        reference = build._texts.remote(dataset, "title")
        ray.wait([reference])
        before = pa.total_allocated_bytes()
        texts = ray.get(reference)
        assert pa.total_allocated_bytes() == before
        assert texts.to_pylist() == dataset.items(["title"])["title"].to_pylist()

    def test_a_task_takes_the_texts_of_its_own_items(self, dataset, monkeypatch):
        taken: list[int] = []

        class Watched(QueryMaker):
            def __init__(self, texts, config):
                taken.append(len(texts))
                super().__init__(texts, config)

        monkeypatch.setattr(build, "QueryMaker", Watched)
        texts = dataset.items(["title"])["title"].cast(pa.large_string()).combine_chunks()
        (users, *_) = dataset.sequence_batches("test")
        asked = asked_of(users, "test", max_history=3)
        found = build._queries(asked, texts, QueriesConfig().derive)
        assert taken == [len(set(asked.targets.tolist()))]
        whole = QueryMaker(texts.to_pylist(), QueriesConfig().derive)
        assert found == whole.queries(asked.targets, asked.keys)

    def test_the_same_words_every_time(self, dataset, store, tmp_path):
        queries = build_queries(QueriesConfig(), dataset, store)
        again = build_queries(QueriesConfig(), dataset, ArtifactStore(tmp_path))
        assert again.key == queries.key
        for split in SPLITS:
            assert rows_of(again, split) == rows_of(queries, split)
        other = load_config(QueriesConfig, overrides=["derive.seed=1"])
        assert rows_of(build_queries(other, dataset, store), "test") != rows_of(queries, "test")

    def test_a_missing_column_is_named(self, dataset, store):
        config = load_config(QueriesConfig, overrides=["derive.column=brand"])
        with pytest.raises(DataError, match=r"item_index, item_id, train_count, title"):
            build_queries(config, dataset, store)


def index_of(dataset: Dataset, item: str) -> int:
    return int(np.flatnonzero(dataset.item_ids() == item)[0])


def user_of(dataset: Dataset, user: str) -> int:
    import pyarrow.dataset as pads

    files = dataset.artifact.files("users/")
    table = pads.dataset(files, format="parquet").to_table()
    return table.filter(pa.compute.equal(table["user_id"], user))["user_index"][0].as_py()


def placed(queries: QuerySet, dataset: Dataset, user: str, item: str) -> dict[str, tuple[str, int]]:
    """Split and length of the history of each query of a user for an item, by its words."""
    asked = (user_of(dataset, user), index_of(dataset, item))
    return {
        query: (split, len(history))
        for split in SPLITS
        for who, history, target, query in rows_of(queries, split)
        if (who, target) == asked
    }


class TestLog:
    HEADER = ("user_id", "query", "item_id", "timestamp")

    def build(self, rows, dataset, store, tmp_path, *overrides, header=HEADER) -> QuerySet:
        path = write(tmp_path / "queries.csv", header, rows)
        given = [f"log.path={path}", "repeats=keep", *overrides]
        return build_queries(load_config(QueriesConfig, overrides=given), dataset, store)

    def whole(self) -> list[tuple[str, str, str, int]]:
        """One query for each interaction, a little before it."""
        return [(user, f"{item} of {user}", item, time) for user, item, time in interactions()]

    def test_queries_follow_the_interactions_they_led_to(self, dataset, store, tmp_path):
        queries = self.build(self.whole(), dataset, store, tmp_path)
        assert not queries.is_synthetic
        made = build_queries(QueriesConfig(repeats="keep", max_history=50), dataset, store)
        nameless = index_of(dataset, "i7")
        for split in SPLITS:
            found = [row[:3] for row in rows_of(queries, split) if row[2] != nameless]
            assert found == [row[:3] for row in rows_of(made, split)]
            for user, _, item, query in rows_of(queries, split):
                assert query.split()[0] == dataset.item_ids()[item]
                assert user_of(dataset, query.split()[2]) == user

    def test_the_nearest_in_time_is_meant(self, dataset, store, tmp_path):
        asked = [("again", f"at {time}", "i1", time) for time in (2, 13, 39, 99)]
        queries = self.build([*self.whole()[:-5], *asked], dataset, store, tmp_path)
        lengths = placed(queries, dataset, "again", "i1")
        # i1 i2 i1 are train, i3 is validation and i1 test, one tick after the last of train.
        assert lengths == {
            "at 2": ("train", 0), "at 13": ("train", 2), "at 39": ("test", 4), "at 99": ("test", 4),
        }  # fmt: skip

    def test_dates_are_read_in_the_unit_of_the_interactions(self, store, tmp_path, ray_local):
        raw = tmp_path / "raw"
        raw.mkdir()
        write(raw / "interactions.csv", ("user_id", "item_id", "timestamp"), interactions())
        days = InteractionsConfig(timestamp_unit="day")
        (dataset,) = prepare(PrepareConfig(source=str(raw), interactions=days), store)
        users, words, items, times = zip(
            *[(user, f"{item} {time}", item, time) for user, item, time in interactions()],
            strict=True,
        )
        dates = pa.array([86_400 * time for time in times], pa.timestamp("s"))
        table = pa.table({"user_id": users, "query": words, "item_id": items, "timestamp": dates})
        pq.write_table(table, tmp_path / "queries.parquet")
        given = [f"log.path={tmp_path / 'queries.parquet'}", "repeats=keep"]
        queries = build_queries(load_config(QueriesConfig, overrides=given), dataset, store)
        found = placed(queries, dataset, "again", "i1")
        taken = sorted(t for who, what, t in interactions() if (who, what) == ("again", "i1"))
        assert list(found) == [f"i1 {time}" for time in taken]
        assert [split for split, _ in found.values()] == ["train", "train", "test"]

    def test_without_times_the_last_is_meant(self, dataset, store, tmp_path):
        rows = [row[:3] for row in self.whole()]
        queries = self.build(rows, dataset, store, tmp_path, header=self.HEADER[:3])
        user = user_of(dataset, "again")
        assert [row[1:3] for row in rows_of(queries, "train") if row[0] == user] == [
            ((index_of(dataset, "i1"),), index_of(dataset, "i2"))
        ]
        assert len([row for row in rows_of(queries, "test") if row[0] == user]) == 3

    def test_queries_of_nobody_are_split_by_their_words(self, dataset, store, tmp_path):
        words = [f"word{number}" for number in range(300)]
        rows = [("", word, f"i{number % ITEMS}", 5) for number, word in enumerate(words)]
        rows += [("", word, f"i{(number + 1) % ITEMS}", 5) for number, word in enumerate(words)]
        queries = self.build(rows, dataset, store, tmp_path, "log.held_out_share=0.2")
        found = {split: rows_of(queries, split) for split in SPLITS}
        assert sum(map(len, found.values())) == 600
        by_split = [{row[3] for row in rows} for rows in found.values()]
        assert sum(map(len, by_split)) == len(set().union(*by_split)) == 300
        assert 40 < len(by_split[1]) < 80
        for rows in found.values():
            assert all(history == () for _, history, _, _ in rows)
            assert all(user >= dataset.num_users for user, *_ in rows)
        assert len({row[0] for rows in found.values() for row in rows}) == 600

    def test_equal_words_in_another_case_stand_together(self, dataset, store, tmp_path):
        words = [f"red word{number}" for number in range(60)]
        forms = [word for one in words for word in (one, one.title(), one.upper(), f"  {one} ")]
        forms += [word.replace(" ", "  ") for word in words]
        rows = [("", form, f"i{number % ITEMS}", 5) for number, form in enumerate(forms)]
        queries = self.build(rows, dataset, store, tmp_path, "log.held_out_share=0.2")
        found = [{row[3] for row in rows_of(queries, split)} for split in SPLITS]
        assert set().union(*found) == {form.strip() for form in forms}
        plain = [{" ".join(text.lower().split()) for text in texts} for texts in found]
        assert sum(map(len, plain)) == len(words)

    def test_a_repeat_in_another_case_is_left_out(self, dataset, store, tmp_path):
        asked = [("again", "Red  SOAP", "i1", 0), ("again", "red soap", "i1", 40)]
        rows = [*self.whole()[:-5], *asked]
        kept = self.build(rows, dataset, store, tmp_path)
        assert placed(kept, dataset, "again", "i1") == {
            "Red  SOAP": ("train", 0), "red soap": ("test", 4),
        }  # fmt: skip
        dropped = self.build(rows, dataset, store, tmp_path, "repeats=drop")
        assert placed(dropped, dataset, "again", "i1") == {"red soap": ("test", 4)}
        assert dropped.artifact.manifest.rows["repeated_query"] == 1

    DEFECTS = (
        ("empty_query", ("u1", "  ", "i1", 5)),
        ("empty_item", ("u1", "soap", "", 5)),
        ("unknown_item", ("u1", "soap", "i99", 5)),
        ("unknown_user", ("stranger", "soap", "i1", 5)),
        ("invalid_timestamp", ("u1", "soap", "i1", "noon")),
        ("negative_timestamp", ("u1", "soap", "i1", -5)),
    )

    @pytest.mark.parametrize(("cause", "row"), DEFECTS)
    def test_a_bad_row_is_named(self, dataset, store, tmp_path, cause, row):
        rows = [*self.whole()[:3], row]
        with pytest.raises(DataError, match=rf"queries.csv row 4: .*{cause}"):
            self.build(rows, dataset, store, tmp_path)

    def test_bad_rows_are_left_out_and_counted(self, dataset, store, tmp_path):
        taken = {item for user, item, _ in interactions() if user == "u1"}
        never = next(f"i{item}" for item in range(ITEMS) if f"i{item}" not in taken)
        defects = [*self.DEFECTS, ("unmatched_query", ("u1", "soap", never, 5))]
        rows = self.whole()
        for cause, row in defects:
            rows[10:10] = [row] * (1 + len(cause) % 3)
        skip = [cause for cause, _ in defects]
        queries = self.build(rows, dataset, store, tmp_path, f"log.skip=[{','.join(skip)}]")
        counts = queries.artifact.manifest.rows
        assert {cause: counts[cause] for cause in skip} == {c: 1 + len(c) % 3 for c in skip}
        whole = self.build(self.whole(), dataset, store, tmp_path)
        for split in SPLITS:
            assert rows_of(queries, split) == rows_of(whole, split)
        examples = queries.artifact.manifest.metrics["examples"]
        assert "lead to an item of its user, got 'soap'" in examples["unmatched_query"]

    def test_a_query_far_from_its_interaction_is_named_or_counted(self, dataset, store, tmp_path):
        week = 7 * 86_400
        # i2 was taken at 10; i1, which is held out, some time after 20.
        rows = [*self.whole(), ("again", "late", "i2", week), ("again", "next", "i1", week)]
        with pytest.raises(DataError, match=r"time must be within log.max_days=1.0 .* got 604800"):
            self.build(rows, dataset, store, tmp_path)
        queries = self.build(rows, dataset, store, tmp_path, "log.skip=[distant_query]")
        assert queries.artifact.manifest.rows["distant_query"] == 1
        assert "late" not in placed(queries, dataset, "again", "i2")
        assert placed(queries, dataset, "again", "i1")["next"] == ("test", 4)
        for bound in ("7", "null"):
            queries = self.build(rows, dataset, store, tmp_path, f"log.max_days={bound}")
            assert placed(queries, dataset, "again", "i2")["late"] == ("train", 1)

    def test_a_split_without_queries_is_refused(self, dataset, store, tmp_path):
        with pytest.raises(DataError, match="every split must have queries"):
            self.build(self.whole()[:1], dataset, store, tmp_path)

    def test_unknown_causes_are_refused(self):
        with pytest.raises(ConfigError, match=r"log\.skip must name causes"):
            load_config(QueriesConfig, overrides=["log.skip=[typo]"])
        with pytest.raises(ConfigError, match="held_out_share"):
            load_config(QueriesConfig, overrides=["log.held_out_share=0.6"])
        with pytest.raises(ConfigError, match="max_days"):
            load_config(QueriesConfig, overrides=["log.max_days=-1"])


DAYS, TAKERS = 7, 24


def moments() -> list[tuple[int, int]]:
    """User and day: everybody takes an item a day."""
    return [(user, day) for user in range(TAKERS) for day in range(DAYS)]


@pytest.fixture(scope="module")
def stages(
    store: ArtifactStore, tmp_path_factory: pytest.TempPathFactory, ray_local: None
) -> list[Dataset]:
    folder = tmp_path_factory.mktemp("stages")
    rows = [(f"u{user}", f"i{day % 3}", day) for user, day in moments()]
    write(folder / "interactions.csv", ("user_id", "item_id", "timestamp"), rows)
    days = InteractionsConfig(timestamp_unit="day")
    split = TemporalConfig(num_stages=2, stage_days=3, test_days=1)
    config = PrepareConfig(source=str(folder), interactions=days, split=split, num_shards=2)
    return prepare(config, store)


class TestStages:
    """Two stages of three days, each with the day after it held out; one log of queries for both.

    Everything is taken in both.
    """

    def build(self, rows, stage, store, tmp_path, *overrides) -> QuerySet:
        path = write(tmp_path / "queries.csv", TestLog.HEADER, rows)
        given = [f"log.path={path}", "repeats=keep", "log.max_days=0", *overrides]
        return build_queries(load_config(QueriesConfig, overrides=given), stage, store)

    def test_queries_go_to_the_stage_of_their_day(self, stages, store, tmp_path):
        rows = [(f"u{user}", f"{user} {day}", f"i{day % 3}", day) for user, day in moments()]
        for first, stage in zip((0, 3), stages, strict=True):
            queries = self.build(rows, stage, store, tmp_path)
            days = {
                split: {int(row[3].split()[1]) for row in rows_of(queries, split)}
                for split in SPLITS
            }
            assert days["train"] == {first, first + 1, first + 2}
            assert days["validation"] == days["test"] == {first + 3}
            counts = queries.artifact.manifest.rows
            assert sum(counts[split] for split in SPLITS) == 4 * TAKERS
            assert counts["outside_days"] == 3 * TAKERS
            example = queries.artifact.manifest.metrics["examples"]["outside_days"]
            assert "timestamp must be of the dataset's days" in example

    def test_queries_of_nobody_train_on_train_days_alone(self, stages, store, tmp_path):
        rows = [("", f"word{one} {day}", "i1", day) for one in range(40) for day in range(7)]
        queries = self.build(rows, stages[0], store, tmp_path, "log.held_out_share=0.2")
        days = {
            split: {int(row[3].split()[1]) for row in rows_of(queries, split)} for split in SPLITS
        }
        assert days == {"train": {0, 1, 2}, "validation": {0, 1, 2, 3}, "test": {0, 1, 2, 3}}
        counts = queries.artifact.manifest.rows
        assert counts["outside_days"] == 3 * 40
        assert 10 < counts["later_query"] < 40
        assert sum(counts[split] for split in SPLITS) + counts["later_query"] == 4 * 40


def test_queries_of_another_dataset_are_refused(dataset, store):
    queries = build_queries(QueriesConfig(), dataset, store)
    queries.check_dataset(dataset)
    with pytest.raises(ConfigError, match="kind 'queries'"):
        QuerySet(dataset.artifact, dataset)
