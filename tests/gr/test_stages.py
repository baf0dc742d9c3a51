"""The chain of stages on a small temporal log."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data.prepare import PrepareConfig, prepare
from forge_ray.data.schema import Dataset
from forge_ray.data.splits import TemporalConfig
from forge_ray.data.synthetic import SyntheticConfig, generate
from forge_ray.errors import ConfigError
from forge_ray.gr import train
from forge_ray.gr.stages import SidVariant, StagesConfig, _all_jobs, _Chain, run_stages
from forge_ray.sid.table import SidTable
from tests.data.test_chain import prepared
from tests.gr.test_train import SMALL


def temporal_stages(store: ArtifactStore, folder: Path) -> list[Dataset]:
    size = {"num_items": 200, "num_users": 400, "branching": [4, 4], "vector_dim": 8}
    generate(SyntheticConfig(**size, num_days=20), str(folder))
    split = TemporalConfig(num_stages=3, stage_days=5, test_days=2, targets="last")
    return prepare(PrepareConfig(source=str(folder), split=split), store)


def random_variant(stages: list[Dataset], path: Path, seed: int = 0) -> SidVariant:
    """SIDs that mean nothing, as a file of somebody else's."""
    rng = np.random.default_rng(seed)
    ids = stages[0].item_ids()
    np.savez(path, codes=rng.integers(0, 16, (200, 2)), item_id=ids.astype(str))
    return SidVariant(path.stem, path, stages[0])


def settings(*overrides: str) -> StagesConfig:
    given = [f"train.{one}" for one in SMALL]
    more = ["train.max_steps=20", "evaluate.ks=[20,100]", *overrides]
    return load_config(StagesConfig, overrides=[*given, *more])


Line = tuple[int, str, int, str, float]


def chain(
    stages: list[Dataset], variant: SidVariant, config: StagesConfig, store: ArtifactStore
) -> list[Line]:
    folder = f"{store.uri}-runs"
    rows = run_stages(stages, [variant], config, store=store, run_dir=folder)
    return [(r.stage, r.training, r.steps, r.model, r.metrics["HR@20"]) for r in rows]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "process_group")
def test_a_chain_continues_and_comes_from_the_store_the_second_time(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = temporal_stages(store, tmp_path / "raw")
    variant, config = (
        random_variant(stages, tmp_path / "table.npz"),
        settings("train.in_process=true"),
    )
    first = chain(stages, variant, config, store)
    ways = [(1, "continued"), (2, "continued"), (2, "scratch"), (3, "continued"), (3, "scratch")]
    assert [row[:2] for row in first] == ways
    assert {row[2] for row in first} == {20}
    parents = [store.open(row[3]).manifest.parents for row in first]
    keys = [store.open(row[3]).key for row in first]
    assert [one[0] for one in parents] == [stages[n - 1].key for n, _ in ways]
    assert [one[2:] for one in parents] == [(), (keys[0],), (), (keys[1],), ()]
    monkeypatch.setattr(train, "_fit", None)
    assert chain(stages, variant, config, store) == first


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local", "process_group")
@pytest.mark.parametrize("place", ["in_process=true", "validation.aside=false"])
def test_trials_leave_the_figures_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    here, there = (ArtifactStore(tmp_path / name) for name in ("here", "there"))
    stages = temporal_stages(here, tmp_path / "raw")[:2]
    variant = random_variant(stages, tmp_path / "table.npz")
    alone = chain(stages, variant, settings("train.in_process=true"), here)
    stages = temporal_stages(there, tmp_path / "raw")[:2]
    monkeypatch.setattr(train, "_fit", None)  # of this process: trials have their own
    config = settings(f"train.{place}", "parallel=2")
    assert chain(stages, variant, config, there) == alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel=0"], "parallel must be >= 1, got 0"),
        (["train.initial.model=other"], "train.initial must be left out"),
        (["train.initial.codes=mapped"], "train.initial must be left out"),
        (
            ["train.model.kind=pretrained_decoder", "train.tasks={search: 1, queries: q}"],
            "train.tasks must read no queries",
        ),
        (
            [
                "train.model.kind=pretrained_decoder",
                "train.tasks={next_item: 0, item_to_sid: 1}",
            ],
            "tasks.validate must be a task that is learned",
        ),
        (
            [
                "train.model.kind=t5",
                "train.data.targets=last",
                "backbones={one: {kind: t5}, all: {kind: decoder}}",
            ],
            "data.targets must be all for model.kind=decoder",
        ),
        (
            ["backbones={rq: {kind: rq_transformer}}", "train.model.hidden_size=32"],
            r"train\.model must be left out beside backbones, got .*'hidden_size': 32.* and rq\.",
        ),
    ],
)
def test_settings_that_no_chain_can_have_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(StagesConfig, overrides=overrides)


def test_a_model_may_be_given_twice_where_it_is_trained() -> None:
    # What checks of train, of its tasks among them, read is train.model.
    both = ["backbones={rq: {kind: rq_transformer}}", "train.model.kind=rq_transformer"]
    assert list(load_config(StagesConfig, overrides=both).models()) == ["rq"]
    assert list(load_config(StagesConfig, overrides=both[:1]).models()) == ["rq"]
    assert list(load_config(StagesConfig, overrides=both[1:]).models()) == ["rq_transformer"]


def large_variant(stages: list[Dataset], store: ArtifactStore, name: str) -> SidVariant:
    """A stored table of 20 MB, open in this process."""
    table = SidTable.from_codes(np.full((3_400_000, 3), 7), [8192] * 3)
    artifact = store.build("sids", name, {"name": name}, produce=table.save)
    variant = SidVariant(name, artifact, stages[0])
    assert variant.table.codes.nbytes > 20e6
    return variant


def two_stages(store: ArtifactStore) -> list[Dataset]:
    """Manifests without content."""
    return [Dataset.open(store, key) for key in prepared(store, (1, 2))]


def require_small(jobs: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """What trials are sent, as it arrives there; all of it is small."""
    sent = pickle.dumps(jobs)
    assert len(sent) < 1 << 20
    return pickle.loads(sent)


def chain_of(stages: list[Dataset], variant: SidVariant, store: ArtifactStore) -> _Chain:
    config = StagesConfig()
    return _Chain(config, variant, "decoder", config.train.model, stages, store, "runs")


def test_trials_are_sent_no_codes_and_open_them_there(store: ArtifactStore) -> None:
    stages = two_stages(store)
    jobs = require_small(_all_jobs([chain_of(stages, large_variant(stages, store, "a"), store)]))
    assert list(jobs) == ["a-decoder", "a-decoder-s2-scratch"]
    table = jobs["a-decoder"].__self__.variant.table  # type: ignore[attr-defined]
    assert isinstance(table.codes, np.memmap)
    assert table.codes[-1].tolist() == [7, 7, 7]


def test_backbones_alone_decide_what_rows_they_can_have() -> None:
    last = ["train.data.targets=last", "backbones={t5: {kind: t5}}"]
    assert load_config(StagesConfig, overrides=last).train.data.targets == "last"
    with pytest.raises(ConfigError, match=r"data\.targets must be all for model\.kind=decoder"):
        load_config(StagesConfig, overrides=[*last[:1], "backbones={d: {kind: decoder}}"])


def test_two_tables_of_one_name_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    stages = two_stages(store)
    paths = [tmp_path / folder / "table.npz" for folder in ("one", "other")]
    chains = [chain_of(stages, SidVariant(one.stem, one, stages[0]), store) for one in paths]
    assert len(_all_jobs(chains[:1])) == 2
    with pytest.raises(ConfigError, match="names of their own, got table-decoder twice"):
        _all_jobs(chains)


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        ([], False),
        (["evaluate.exclude_seen=true"], True),
        (["train.validation.exclude_seen=true"], True),
        (["evaluate.exclude_seen=true", "train.validation.exclude_seen=true"], False),
    ],
)
def test_validation_judges_as_the_table_does_or_says_so(
    store: ArtifactStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
    warns: bool,
) -> None:
    config = settings(*overrides)
    excludes = "train.validation.exclude_seen=true" in overrides
    assert config.train.validation.exclude_seen is excludes
    run_stages([], [], config, store=store, run_dir=str(tmp_path))
    assert ("train.validation.exclude_seen should be" in caplog.text) is warns


def test_every_backbone_must_read_the_whole_history(store: ArtifactStore, tmp_path: Path) -> None:
    """Refused before the first of them trains."""
    backbones = "backbones={one: {kind: decoder}, two: {kind: rq_transformer, places: 20}}"
    config = load_config(StagesConfig, overrides=["train.max_history=20", backbones])
    with pytest.raises(ConfigError, match=r"model\.places must be > max_history=20"):
        run_stages([], [], config, store=store, run_dir=str(tmp_path))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("widths", ["[100]", "[10,10]"])
def test_widths_are_checked_before_anything_is_trained(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widths: str
) -> None:
    stages = temporal_stages(store, tmp_path / "raw")
    monkeypatch.setattr(train, "_fit", None)
    variant = random_variant(stages, tmp_path / "a.npz")
    with pytest.raises(ConfigError, match=r"widths must be 2 integers .* max\(ks\)=100"):
        chain(stages, variant, settings(f"evaluate.widths={widths}"), store)
