"""A made-up catalogue and log with known structure, of any size: the whole path without data.

What is planted: a topic tree that shapes the vectors, skewed popularity, users who move through
neighbouring topics and along fixed item-to-item links, popularity that drifts over the days, and
items that appear late or never. Item ids, file order and row order reveal nothing.

Every shard draws from its own counter-based generator (seed, stream, shard number), and everything
that shards share is a closed form of the seed, so the same configuration gives the same bytes
whatever the number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.artifacts import open_filesystem
from forge_ray.config import to_yaml
from forge_ray.data import tasks
from forge_ray.data.hashing import unit_uniform
from forge_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DAY_S = 86_400
MARKER = "synthetic.yaml"
_STARTED = "_synthetic.yaml"
_NODES, _ITEMS, _USERS = 1, 2, 3
_LINKS = 3
_COLORS = ("amber", "azure", "coral", "ebony", "ivory", "jade", "lilac", "ochre", "pearl", "ruby")
_THINGS = ("basin", "candle", "drum", "easel", "flask", "globe", "harp", "jug", "kettle", "lamp")


@dataclass(kw_only=True)
class SyntheticConfig:
    """Size and structure of a synthetic data set."""

    num_items: int = 2000
    """Catalogue size."""
    num_users: int = 4000
    """Users."""
    vector_dim: int = 64
    """Width of the item vectors, which have length 1."""
    branching: list[int] = field(default_factory=lambda: [8, 8])
    """Children per node on each level of the topic tree; their product is the number of topics."""
    vector_noise: float = 0.5
    """Length of an item's own part in its vector; the topic's part on tree level l is 0.7^l."""
    mean_events: int = 12
    """Mean interactions per user before repeats are taken out."""
    min_events: int = 5
    """Fewest interactions per user before repeats are taken out."""
    max_events: int = 60
    """Most interactions per user."""
    popularity_exponent: float = 1.0
    """Zipf exponent of the items of one topic."""
    link_share: float = 0.35
    """Steps that follow one of the 3 fixed links of the item before."""
    stay_share: float = 0.35
    """Steps that stay in the topic of the item before."""
    near_share: float = 0.15
    """Steps to a topic with the same parent; the other steps go where the user's taste lies."""
    num_days: int = 30
    """Days the log covers."""
    drift: float = 0.2
    """How far popularity moves over all days, as a share of a topic's items."""
    cold_share: float = 0.1
    """Items that appear only in the second half of the days, a third of them not at all."""
    start: int = 1_700_006_400
    """Time of the first day's midnight, seconds since 1970 (2023-11-15 UTC)."""
    users_per_shard: int = 1000
    """Users per shard; part of what fixes the bytes."""
    items_per_shard: int = 65_536
    """Items per shard; part of what fixes the bytes."""
    seed: int = 0
    """Fixes every byte."""

    def __post_init__(self) -> None:
        """Check ranges and sums."""
        for name in (
            "num_items",
            "num_users",
            "vector_dim",
            "min_events",
            "num_days",
            "users_per_shard",
            "items_per_shard",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise {name}.")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}. Use another seed.")
        if not self.branching or min(self.branching) < 1:
            raise ConfigError(
                f"branching must hold numbers >= 1, got {self.branching}. Use [8, 8]."
            )
        if self.num_items < self.num_topics:
            raise ConfigError(
                f"num_items must be >= the {self.num_topics} topics of branching, got "
                f"{self.num_items}. Raise num_items or choose a smaller tree."
            )
        if not self.min_events <= self.mean_events <= self.max_events:
            raise ConfigError(
                "mean_events must lie between min_events and max_events, got "
                f"{self.min_events}, {self.mean_events}, {self.max_events}. Change one of them."
            )
        shares = self.link_share + self.stay_share + self.near_share
        if shares > 1 or min(self.link_share, self.stay_share, self.near_share) < 0:
            raise ConfigError(
                f"link_share + stay_share + near_share must be <= 1, got {shares:g}. Lower one."
            )

    @property
    def num_topics(self) -> int:
        """Leaves of the topic tree."""
        return int(np.prod(self.branching))


@dataclass(frozen=True, slots=True)
class GeneratedData:
    """What `generate` wrote.

    Attributes:
        directory: folder with `interactions/`, `items/` and `vectors/`.
        interactions: rows written; None when the folder held this very data set already.
    """

    directory: str
    interactions: int | None


def generate(config: SyntheticConfig, directory: str) -> GeneratedData:
    """Write the data set as Parquet shards in the conventional layout; Ray must be running.

    A folder that holds this very data set already is left as it is; one where this very data set
    was cut off is completed.

    Args:
        config: size and structure.
        directory: path or URI; new, or empty.

    Raises:
        DataError: the folder holds something else.
    """
    filesystem, root = open_filesystem(directory)
    if _is_complete(config, filesystem, root):
        return GeneratedData(directory, None)
    for part in ("interactions", "items", "vectors"):
        filesystem.create_dir(f"{root}/{part}", recursive=True)
    _write_text(filesystem, f"{root}/{_STARTED}", to_yaml(config))
    target = {"config": config, "filesystem": filesystem, "root": root}
    item_shards = -(-config.num_items // config.items_per_shard)
    tasks.results(tasks.for_each(range(item_shards), _write_items, **target))
    user_shards = -(-config.num_users // config.users_per_shard)
    written = tasks.results(tasks.for_each(range(user_shards), _write_users, **target))
    _write_text(filesystem, f"{root}/{MARKER}", to_yaml(config))
    filesystem.delete_file(f"{root}/{_STARTED}")
    rows = int(written["rows"].to_numpy().sum())
    logger.info("wrote %d synthetic interactions to %s", rows, directory)
    return GeneratedData(directory, rows)


def _is_complete(config: SyntheticConfig, filesystem: Any, root: str) -> bool:
    entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    names = {entry.base_name for entry in entries}
    # Shards alone prove nothing: imported data has the same layout and must not be overwritten.
    for name in (MARKER, _STARTED):
        if name in names:
            with filesystem.open_input_stream(f"{root}/{name}") as stream:
                if stream.read().decode() == to_yaml(config):
                    return name == MARKER
    if names:
        raise DataError(
            f"{root} must be empty or hold this data set, got {sorted(names)}. "
            "Choose another directory, or delete this one."
        )
    return False


def _write_text(filesystem: Any, path: str, text: str) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(text.encode())


def _generator(config: SyntheticConfig, stream: int, shard: int) -> np.random.Generator:
    seed = np.random.SeedSequence([config.seed, stream, shard])
    return np.random.Generator(np.random.Philox(seed))


class World:
    """All that shards share: the topic tree, popularity, links, releases. Nothing is per user.

    Item i belongs to topic ``i % T`` and has popularity place ``i // T`` there.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config

    @cached_property
    def topic_sizes(self) -> NDArray[np.int64]:
        """Items per topic ``[T]``."""
        topics = np.arange(self.config.num_topics)
        return (self.config.num_items - topics - 1) // self.config.num_topics + 1

    @cached_property
    def _popularity(self) -> NDArray[np.float64]:
        weights = np.arange(1, self.topic_sizes.max() + 1) ** -self.config.popularity_exponent
        return np.cumsum(weights)

    @cached_property
    def topic_vectors(self) -> NDArray[np.float64]:
        """Sum of the node vectors on the way to each topic ``[T, D]``."""
        topics = np.arange(self.config.num_topics)
        total = np.zeros((len(topics), self.config.vector_dim))
        below = self.config.num_topics
        for level, children in enumerate(self.config.branching):
            nodes = self.config.num_topics // below * children
            below //= children
            draw = _generator(self.config, _NODES, level).standard_normal((nodes, total.shape[1]))
            draw /= np.linalg.norm(draw, axis=1, keepdims=True)
            total += 0.7**level * draw[topics // below]
        return total

    def item_ids(self, items: NDArray[np.int64]) -> pa.Array:
        """Return ids that tell nothing of topic or popularity: an affine permutation of 0..N-1."""
        step = int(self.config.num_items * 0.618) | 1
        while np.gcd(step, self.config.num_items) != 1:
            step += 2
        shuffled = (items * step + self.config.seed) % self.config.num_items
        width = len(str(self.config.num_items - 1))
        return pa.array(np.char.add("i", np.char.zfill(shuffled.astype(str), width)))

    def places(
        self, topics: NDArray[np.int64], uniform: NDArray[np.float64], days: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Draw items of these topics by popularity on these days; all ``[n]``."""
        sizes = self.topic_sizes[topics]
        ranks = np.searchsorted(self._popularity, uniform * self._popularity[sizes - 1], "right")
        shift = (self.config.drift * days / self.config.num_days * sizes).astype(np.int64)
        return (np.minimum(ranks, sizes - 1) + shift) % sizes * self.config.num_topics + topics

    def links(self, items: NDArray[np.int64], which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the item that link number ``which`` of each item leads to ``[n]``.

        The link stays in the topic or leads to the next topic with the same parent.
        """
        draw = unit_uniform(items * _LINKS + which, salt=self.config.seed)
        topics = items % self.config.num_topics
        topics = np.where(which == 0, topics, self.neighbour(topics, np.ones_like(topics)))
        return self.places(topics, draw, np.zeros(len(items)))

    def neighbour(self, topics: NDArray[np.int64], step: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the topic ``step`` places on among those with the same parent ``[n]``."""
        children = self.config.branching[-1]
        return topics // children * children + (topics % children + step) % children

    def tastes(self, uniform: NDArray[np.float64], days: NDArray[np.float64]) -> NDArray[np.int64]:
        """Draw topics by their popularity on these days ``[n]``; the popular ones drift."""
        count = self.config.num_topics
        ranks = (uniform**1.5 * count).astype(np.int64)
        shift = (self.config.drift * days / self.config.num_days * count).astype(np.int64)
        return (np.minimum(ranks, count - 1) + shift) % count

    def release_days(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the day each item appears ``[n]``: 0, or late for cold items, or never."""
        cold = unit_uniform(items, salt=self.config.seed + 1) < self.config.cold_share
        days = self.config.num_days * (0.5 + 0.75 * unit_uniform(items, salt=self.config.seed + 2))
        return np.where(cold, days, 0.0)


# ---- items ----


def _write_items(
    number: int, *, config: SyntheticConfig, filesystem: Any, root: str
) -> Iterator[pa.Table]:
    world = World(config)
    start = number * config.items_per_shard
    items = np.arange(start, min(start + config.items_per_shard, config.num_items))
    vectors = _item_vectors(world, items, _generator(config, _ITEMS, number))
    ids = world.item_ids(items)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), config.vector_dim)
    tables = {
        "items": pa.table({"item_id": ids, "title": _titles(config, items)}),
        "vectors": pa.table({"item_id": ids, "embedding": lists}),
    }
    for part, table in tables.items():
        # In the order of the ids, so that the order of rows tells nothing either.
        path = f"{root}/{part}/part-{number:05d}.parquet"
        order = np.argsort(ids.to_numpy(zero_copy_only=False))
        tasks.write_shard(table.take(pa.array(order)), path, filesystem)
    yield pa.table({"rows": pa.array([len(items)], pa.int64())})


def _item_vectors(
    world: World, items: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.float32]:
    dim = world.config.vector_dim
    own = generator.standard_normal((len(items), dim)) * world.config.vector_noise / np.sqrt(dim)
    vectors = world.topic_vectors[items % world.config.num_topics] + own
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _titles(config: SyntheticConfig, items: NDArray[np.int64]) -> NDArray[np.str_]:
    topics, place = items % config.num_topics, items // config.num_topics
    parents = topics // config.branching[-1]
    color = np.char.add(np.array(_COLORS)[parents % len(_COLORS)], " ")
    thing = np.char.add(np.array(_THINGS)[topics % config.branching[-1] % len(_THINGS)], " ")
    number = unit_uniform(place, salt=config.seed + 3) * 10_000
    return np.char.add(np.char.add(color, thing), number.astype(np.int64).astype(str))


# ---- users ----


def _write_users(
    number: int, *, config: SyntheticConfig, filesystem: Any, root: str
) -> Iterator[pa.Table]:
    start = number * config.users_per_shard
    count = min(config.users_per_shard, config.num_users - start)
    walks = walk(World(config), count, _generator(config, _USERS, number))
    width = len(str(config.num_users - 1))
    users = np.char.add("u", np.char.zfill((walks.users + start).astype(str), width))
    table = pa.table(
        {
            "user_id": pa.array(users),
            "item_id": World(config).item_ids(walks.items),
            "timestamp": pa.array(walks.times),
        }
    )
    tasks.write_shard(table, f"{root}/interactions/part-{number:05d}.parquet", filesystem)
    yield pa.table({"rows": pa.array([table.num_rows], pa.int64())})


@dataclass(frozen=True, slots=True)
class Walks:
    """Events of some users, by user, then by time; all ``[E]`` int64."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]


def walk(world: World, count: int, generator: np.random.Generator) -> Walks:
    """Let ``count`` users walk through the catalogue, all of them one step at a time.

    Repeats of an item by the same user, and items not yet released, are taken out.
    """
    config = world.config
    steps = config.max_events
    lengths = config.min_events + generator.geometric(
        1 / (config.mean_events - config.min_events + 1), count
    )
    lengths = np.minimum(lengths - 1, steps)
    inside = np.arange(steps) < lengths[:, None]
    # Times past a user's last event sort behind all others.
    uniform = np.sort(np.where(inside, generator.random((count, steps)), 1.0), axis=1)
    offsets = uniform * config.num_days * DAY_S
    favourites = world.tastes(generator.random((count, 3)), np.zeros((count, 1)))
    items = np.empty((count, steps), dtype=np.int64)
    current = world.places(favourites[:, 0], generator.random(count), offsets[:, 0] / DAY_S)
    for step in range(steps):
        items[:, step] = current
        days = offsets[:, min(step + 1, steps - 1)] / DAY_S
        current = _next_items(world, current, favourites, days, generator)
    times = config.start + offsets.astype(np.int64)
    users = np.broadcast_to(np.arange(count)[:, None], items.shape)
    return _clean(world, Walks(users[inside], items[inside], times[inside]))


def _next_items(
    world: World,
    current: NDArray[np.int64],
    favourites: NDArray[np.int64],
    days: NDArray[np.float64],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    config = world.config
    count = len(current)
    choice = generator.random(count)
    topics = current % config.num_topics
    step = generator.integers(1, max(config.branching[-1], 2), count)
    taste = favourites[np.arange(count), generator.integers(0, favourites.shape[1], count)]
    fresh = world.tastes(generator.random(count), days)
    taste = np.where(generator.random(count) < 0.5, taste, fresh)
    edges = np.cumsum([config.link_share, config.stay_share, config.near_share])
    near = world.neighbour(topics, step)
    topics = np.where(choice < edges[1], topics, np.where(choice < edges[2], near, taste))
    drawn = world.places(topics, generator.random(count), days)
    linked = world.links(current, generator.integers(0, _LINKS, count))
    return np.where(choice < edges[0], linked, drawn)


def _clean(world: World, walks: Walks) -> Walks:
    released = world.release_days(walks.items) * DAY_S + world.config.start <= walks.times
    keys = walks.users * world.config.num_items + walks.items
    candidates = np.flatnonzero(released)
    _, first = np.unique(keys[candidates], return_index=True)
    keep = np.sort(candidates[first])
    return Walks(walks.users[keep], walks.items[keep], walks.times[keep])
