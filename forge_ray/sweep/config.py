"""What a sweep file says, and which part of it is the sweep's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from forge_ray.config import canonical_json, to_mapping
from forge_ray.errors import ConfigError
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.objectives import direction
from forge_ray.sweep.order import ORDERS
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.trackers.config import TrackersConfig

IDENTITY = "identity.json"
"""The identity that a sweep began with, in its folder."""

SAMPLERS = ("quasi_random", "grid", "tpe", "gp", "nsga2")
DRAWING = ("tpe", "gp", "nsga2")
"""Samplers of Optuna that learn: they propose a trial when it starts."""


@dataclass(kw_only=True)
class SamplerConfig:
    """How points are drawn from the space."""

    kind: str = "quasi_random"
    """`quasi_random` (Sobol) and `grid` fix the trials before they run; `tpe`, `gp` (Gaussian
    process) and `nsga2` of Optuna learn from those that ended."""
    seed: int = 0
    """Seed of the Sobol scrambling or of Optuna's sampler."""

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise ConfigError(
                f"sampler.kind must be one of {', '.join(SAMPLERS)}, got {self.kind!r}. Pick one."
            )


@dataclass(kw_only=True)
class WarmStartConfig:
    """Earlier sweeps to start from; see `forge_ray.sweep.warm_start`."""

    sweeps: list[str] = field(default_factory=list)
    """Names of sweeps beside this one, or paths of their folders."""
    best: int = 5
    """How many of the best designs of each run first; those outside the space are left out."""

    def __post_init__(self) -> None:
        if self.best < 0:
            raise ConfigError(f"warm_start.best must be >= 0, got {self.best}. 0 runs none first.")


@dataclass(kw_only=True)
class ConstraintConfig:
    """Which designs the search passes over for free; `gate.min_capacity` is one more such rule."""

    max_sid_bits: float | None = None
    """Largest token budget: log2 of the codebook sizes, summed over the quantizer's levels."""
    min_sid_bits: float | None = None
    """Smallest token budget."""

    def __post_init__(self) -> None:
        low, high = self.min_sid_bits or 0.0, self.max_sid_bits
        if low < 0 or (high is not None and high < max(low, 1.0)):
            raise ConfigError(
                "constraints must have 0 <= min_sid_bits <= max_sid_bits and max_sid_bits >= 1, "
                f"got {self.min_sid_bits} and {self.max_sid_bits}. Three levels of 256 have 24."
            )


@dataclass(kw_only=True)
class AutoscaledNodes:
    """A type of node that the cluster's autoscaler may add, as its own configuration says it."""

    max_nodes: int = 1
    """Most nodes of this type, those that run included."""
    cpus: float = 0.0
    """CPUs of a node."""
    gpus: float = 0.0
    """GPUs of a node."""
    memory_gb: float = 0.0
    """Memory of a node that Ray hands out, GiB."""
    resources: dict[str, float] = field(default_factory=dict)
    """Other resources of a node, by Ray's names."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels of a node."""

    def __post_init__(self) -> None:
        if self.max_nodes < 1 or min(self.cpus, self.gpus, self.memory_gb) < 0:
            raise ConfigError(
                "resources.autoscaled.* must have max_nodes >= 1 and cpus, gpus, memory_gb >= 0, "
                f"got {self.max_nodes}, {self.cpus}, {self.gpus}, {self.memory_gb}. Copy them from "
                "the cluster's configuration."
            )


@dataclass(kw_only=True)
class ResourceConfig:
    """What each stage of a trial asks of the cluster; training asks in `gr`, after the gate."""

    trial_memory_mb: int = 512
    """Memory of the trial's driver. It asks for no CPU: it waits, its stages work."""
    trial_restarts: int = 3
    """How often a trial starts again whose process was lost (killed, out of memory, its node gone).
    Errors of the trial itself do not count: the next `sweep run` tries those."""
    driver_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that the trials' drivers may run on, e.g. `ray.io/market-type: "!spot"`;
    a value may be negated (`!spot`) or a choice (`in(a, b)`). Empty allows every node."""
    sid_cpus: float = 0.5
    """CPUs of the tokenizer and scoring task."""
    sid_gpus: float = 0.0
    """GPUs of the tokenizer task."""
    evaluate_cpus: float = 0.5
    """CPUs of the final evaluation."""
    evaluate_gpus: float = 0.0
    """GPUs of the final evaluation."""
    stage_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes for the stages beside training: preparing data, tokenizer, scores, final
    evaluation, and the tasks that they start. Empty allows every node: trials prefer those without
    GPUs, but Ray Data makes any that the autoscaler has."""
    autoscaled: dict[str, AutoscaledNodes] = field(default_factory=dict)
    """Types of nodes that the autoscaler may add, by their names in its configuration. Ray does not
    tell them; without this only nodes that run count."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """The final row of a trial, on the validation split, and the test row of the winner."""

    users: int = 0
    """Validation users; 0 takes all. The test split is always evaluated whole."""
    ks: list[int] = field(default_factory=lambda: [5, 10, 20, 100])
    """Cut-offs."""
    batch_users: int = 64
    """Users per beam search."""

    def __post_init__(self) -> None:
        if self.users < 0 or self.batch_users < 1 or not self.ks:
            raise ConfigError(
                "evaluation must have users >= 0, batch_users >= 1 and ks, got "
                f"{self.users}, {self.batch_users}, {self.ks}. Leave it out for the defaults."
            )


@dataclass(kw_only=True)
class BudgetConfig:
    """Where a sweep stops before its last trial; `num_trials` limits their number."""

    max_hours: float | None = None
    """Hours that the sweep may run, all its sessions together; null sets no limit."""
    max_cost: float | None = None
    """USD that it may cost by `prices`, all its sessions together; null sets no limit."""
    prices: Prices = field(default_factory=Prices)
    """What resources cost."""

    def __post_init__(self) -> None:
        for name, value in (("max_hours", self.max_hours), ("max_cost", self.max_cost)):
            if value is not None and value <= 0:
                raise ConfigError(f"budget.{name} must be > 0 or null, got {value}. Raise it.")
        if self.max_cost is not None and not self.prices.is_set:
            raise ConfigError(
                f"budget.prices must be set for budget.max_cost={self.max_cost}, got none: nothing "
                "would ever cost anything. Set budget.prices.cpu_hour and gpu_hour."
            )


@dataclass(kw_only=True)
class SweepConfig:
    """A sweep file."""

    name: str = ""
    """Identity together with the part of this file that fixes a trial's meaning."""
    data: str = ""
    """Prepared dataset (path, name, key) or folder of raw files; empty uses `synthetic`."""
    synthetic: dict[str, Any] = field(default_factory=dict)
    """Settings of the synthetic catalogue, used where `data` is empty."""
    space: dict[str, Any] = field(default_factory=dict)
    """Searched parameters: see `forge_ray.sweep.space.parse_space`."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Fixed points, run first; the random control belongs here. They need not lie in the space."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    """Earlier sweeps whose best designs run first and whose trials teach the sampler."""
    constraints: ConstraintConfig = field(default_factory=ConstraintConfig)
    """Which points of the space are no trials; fixed points are not asked."""
    sid: dict[str, Any] = field(default_factory=dict)
    """Settings all trials share, as in `forge-ray sid fit`."""
    gr: dict[str, Any] = field(default_factory=dict)
    """Settings all trials share, as in `forge-ray gr train`."""
    score: dict[str, Any] = field(default_factory=dict)
    """Settings of the proxies, as in `forge-ray sid score`."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How points are drawn."""
    num_trials: int | None = 12
    """Trials in all, fixed points included; null runs a whole grid."""
    max_concurrent: int | None = 2
    """Most trials at a time, fewer where the cluster does not hold so many beside the data tasks
    that they wait for; null takes as many as it holds."""
    order: str = "promising"
    """`promising` scores all planned designs first and trains the best-looking ones early; every
    other trial follows the plan. `planned` keeps the order of points, grid or sequence. Points that
    a sampler draws come as they are drawn."""
    metric: str = "ItemNDCG@10"
    """Validation metric that ranks trials; larger is better."""
    objectives: list[str] = field(default_factory=list)
    """What samplers that learn aim at together, `metric` first, e.g. [ItemNDCG@10,
    ItemNDCG@10/tail, sid_bits]; empty means `metric` alone. See `forge_ray.sweep.objectives`."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Pruning before training."""
    asha: AshaConfig = field(default_factory=AshaConfig)
    """Pruning during training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How a trained generator is judged."""
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    """What stages ask of the cluster."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Hours and money; what is left unfinished continues with a larger one."""
    folder: str = ""
    """Where ledger, Optuna storage, checkpoints and report go; empty means
    `<store>/sweeps/<name>`, which needs a local store."""
    storage: str = ""
    """Optuna storage URL (sqlite:///…, postgresql://…) or the path of a `.journal` file; empty
    keeps a SQLite file in the sweep's folder."""
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
    """MLflow, TensorBoard, Weights & Biases: where trials are reported to beside the ledger."""
    finalize: bool = False
    """Whether `sweep run` ends with the test split, the first time that it finishes."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(
                f"name must be a short word without '/', got {self.name!r}. Name the sweep."
            )
        if self.num_trials is not None and self.num_trials < 1:
            raise ConfigError(f"num_trials must be >= 1 or null, got {self.num_trials}.")
        if self.num_trials is None and self.sampler.kind != "grid":
            raise ConfigError(
                f"num_trials must be set for sampler {self.sampler.kind}, got null. "
                "Set it, or use sampler.kind=grid."
            )
        _check_objectives(self.metric, self.objectives, self.budget.prices)
        if self.order not in ORDERS:
            raise ConfigError(
                f"order must be one of {', '.join(ORDERS)}, got {self.order!r}. Pick one."
            )
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(
                f"max_concurrent must be >= 1 or null, got {self.max_concurrent}. Raise it."
            )
        if not self.space and not self.points:
            raise ConfigError("space must name a parameter, got none. Add one, or add points.")

    @property
    def aims(self) -> list[str]:
        """All objectives, the metric first."""
        return self.objectives or [self.metric]

    @property
    def takes_turns(self) -> bool:
        """Whether every other trial is picked for its promise; drawn ones come as drawn."""
        return self.order == "promising" and self.sampler.kind not in DRAWING


def _check_objectives(metric: str, objectives: Sequence[str], prices: Prices) -> None:
    if not objectives:
        return
    for name in objectives:
        direction(name)
    if objectives[0] != metric or len(set(objectives)) != len(objectives):
        raise ConfigError(
            f"objectives must begin with metric ({metric}) and not repeat, got "
            f"{list(objectives)}. Change their order, or metric."
        )
    if "cost_usd" in objectives and not prices.is_set:
        raise ConfigError(
            "budget.prices must be set for the objective cost_usd, got none: every trial would "
            "cost 0. Set budget.prices.cpu_hour and gpu_hour."
        )


_FIXED = ("sid", "gr", "score", "sampler", "metric", "gate", "asha", "evaluation")


CHANGEABLE = tuple(
    one.name
    for one in fields(SweepConfig)
    if one.name not in (*_FIXED, "name", "data", "synthetic", "folder")
)
"""Sections of a sweep file that may change under its name."""


def identity(config: SweepConfig, *, dataset_key: str) -> dict[str, Any]:
    """The part of a sweep that may not change under its name: space, budget and resources may."""
    mapping = to_mapping(config)
    return without_running({"dataset": dataset_key, **{name: mapping[name] for name in _FIXED}})


def without_running(meaning: Mapping[str, Any]) -> dict[str, Any]:
    """An identity less the settings of where stages run: they change nothing of what is computed.

    One that an earlier version wrote may still hold some.
    """
    # Imports torch, which most readers of a sweep file do without.
    from forge_ray.gr.config import without_execution

    kept = dict(meaning)
    if "gr" in kept:
        kept["gr"] = without_execution(kept["gr"])
    for section, running in (("sid", "encode"), ("evaluation", "batch_users")):
        if section in kept:
            kept[section] = {name: one for name, one in kept[section].items() if name != running}
    return kept


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Leaves that two nested mappings disagree on, one line each: `gr.lr: 0.001 -> 0.01`."""
    first, second = _flat(old), _flat(new)
    missing = object()
    lines = []
    for name in sorted({*first, *second}):
        before, after = first.get(name, missing), second.get(name, missing)
        if before is missing or after is missing or before != after:
            shown = ["unset" if one is missing else str(one) for one in (before, after)]
            lines.append(f"{name}: {shown[0]} -> {shown[1]}")
    return lines


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    leaves: dict[str, str] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            leaves.update(_flat(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = canonical_json(value)
    return leaves
