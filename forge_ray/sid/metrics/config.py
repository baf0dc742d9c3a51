"""What is read and computed when SID tables are scored; no metric lives here."""

from __future__ import annotations

from dataclasses import dataclass, field

from forge_ray.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """The parallel probe: a small sequence model with one head per level, trained on the spot.

    Source: shape of RPG (arXiv 2506.05781) at a fraction of its width.
    """

    steps: int = 0
    """Training steps; 0 leaves the probe out. Levels are predicted apart, so items have to be
    learned one by one: some thousands of steps for 12,000 items, at about 40 ms of CPU each."""
    batch_users: int = 128
    """Users of one step; every place of their histories is a target."""
    history: int = 10
    """Newest items the model reads."""
    width: int = 64
    """Width of token vectors and of the model."""
    layers: int = 2
    """Transformer layers, 2 in the source."""
    heads: int = 4
    """Attention heads; must divide `width`. 4 in the source."""
    dropout: float = 0.1
    """Of inputs and layers; 0.5 in the source, which trains for hundreds of epochs."""
    temperature: float = 0.07
    """Divides the cosines of the heads; the source's default."""
    learning_rate: float = 0.003
    """Peak of a linear warm-up over a tenth of the steps and a linear decay to 0."""
    users: int = 2_000
    """Held-out users that are ranked over the whole catalogue."""
    k: int = 10
    """Cutoff of ItemHit and ItemNDCG."""

    def __post_init__(self) -> None:
        """Check the values."""
        lowest = {"steps": 0, "batch_users": 1, "history": 1, "width": 1, "layers": 1, "heads": 1}
        for name, low in {**lowest, "users": 1, "k": 1}.items():
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"score.parallel.{name} must be >= {low}, got {value}. Raise it.")
        if self.width % self.heads:
            raise ConfigError(
                f"score.parallel.heads must divide parallel.width {self.width}, got {self.heads}. "
                "Change one of the two."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"score.parallel.dropout must be in [0, 1), got {self.dropout}. Set a share."
            )
        for name in ("temperature", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"score.parallel.{name} must be > 0, got {getattr(self, name)}. Raise it."
                )


@dataclass(kw_only=True)
class ScoreConfig:
    """How much is read and how the behavioural metrics are computed."""

    space: str | None = None
    """Vector space of the dataset for embedding hitrate; by default the one the SIDs were fitted
    on, and `default` for tables made elsewhere."""
    max_users: int = 50_000
    """Held-out users read for the probe; their standard error is about 0.01 bits at 20,000."""
    max_train_users: int = 200_000
    """Train users whose transitions are counted; about 120 bytes for each of their interactions."""
    hitrate_users: int = 5_000
    """Held-out users read for embedding hitrate, about as many as FORGE's lists."""
    hitrate_k: int = 30
    """Neighbours of each history item, as published."""
    hitrate_history: int = 50
    """Newest history items that search."""
    hitrate_gallery: int = 200_000
    """Most items searched; of larger catalogues the items of the scored lists and a seeded sample
    of the rest (FORGE: about 500,000). Memory 4 bytes for each of D numbers."""
    hitrate_shard: int = 250_000
    """Gallery items that one search holds; larger galleries are searched shard by shard, on Ray
    where one is up, with the same result."""
    hitrate_exact_limit: int = 1_000_000
    """Distinct vectors up to which the search is exact, HNSW beyond."""
    sample_items: int = 100_000
    """Items on which reconstruction, order agreement and code cosines are measured."""
    order_triplets: int = 20_000
    """Triplets of the order agreement; its standard error is about 0.5 / √triplets."""
    probe_history: int = 5
    """Newest history items the probe conditions on."""
    probe_window: int = 3
    """Largest distance of a counted transition."""
    probe_decay: float = 0.6
    """Weight of one more step, of distance in transitions and of age in histories."""
    probe_steps: int = 60
    """EM steps for the probe's mixture."""
    tail_max_count: int = 5
    """Train interactions up to which a target belongs to the tail."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The trained probe; off unless `parallel.steps` is set."""
    seed: int = 0
    """Fixes samples, the halves of the validation users, the controls and the probe's training."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in (
            "max_users",
            "max_train_users",
            "hitrate_users",
            "hitrate_k",
            "hitrate_history",
            "hitrate_gallery",
            "hitrate_shard",
            "sample_items",
            "order_triplets",
            "probe_history",
            "probe_window",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"score.{name} must be >= 1, got {value}. Raise it.")
