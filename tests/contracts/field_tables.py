"""For every field of every component: another value that must give another result.

A new field without a line here fails `test_every_field`, and so does one whose line changes
nothing. `running` names fields that only say where work is done, each with its promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_ray.embed.adapter import AdapterConfig
from forge_ray.embed.behaviour import BehaviourConfig
from forge_ray.embed.counts import SwingCountsConfig, WindowCountsConfig
from forge_ray.embed.encoders.image import ImageConfig
from forge_ray.embed.encoders.text import TextConfig
from forge_ray.embed.graph_smooth import GraphSmoothConfig
from forge_ray.embed.sasrec import SasRecConfig
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.embed.teachers.sasrec import SasRecTeacherConfig
from forge_ray.embed.teachers.two_tower import TwoTowerConfig
from forge_ray.embed.vectors import VectorsConfig
from forge_ray.sid.al_gr import AlGrExportConfig
from forge_ray.sid.alignment import presets
from forge_ray.sid.alignment.diversity import DiversityConfig
from forge_ray.sid.alignment.hamr import HamrConfig
from forge_ray.sid.alignment.terms import TermConfig
from forge_ray.sid.alignment.users import UserTokenizerConfig
from forge_ray.sid.config import EncodeConfig, SidConfig, TrainConfig
from forge_ray.sid.metrics.config import ParallelConfig, ScoreConfig
from forge_ray.sid.quantizers import sinkhorn
from forge_ray.sid.quantizers.fsq import FsqConfig
from forge_ray.sid.quantizers.opq import OpqConfig
from forge_ray.sid.quantizers.prq_kmeans import PrqKmeansConfig
from forge_ray.sid.quantizers.psrq import PsrqConfig
from forge_ray.sid.quantizers.random_codes import RandomConfig
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.rq_opq import RqOpqConfig
from forge_ray.sid.quantizers.rq_vae_config import RqVaeConfig, SelectionConfig
from forge_ray.sid.quantizers.shuffled import ShuffledConfig
from forge_ray.sid.quantizers.sinkhorn import NearestConfig, SinkhornConfig
from forge_ray.sid.resolvers.bucket import BucketConfig
from forge_ray.sid.resolvers.extra_token import ExtraTokenConfig
from forge_ray.sid.resolvers.knn_cap import KnnCapConfig
from forge_ray.sid.resolvers.pop_rank import PopRankConfig
from forge_ray.sid.resolvers.random_cap import RandomCapConfig
from forge_ray.sid.resolvers.sinkhorn_last import SinkhornLastConfig
from forge_ray.sid.resolvers.zcr import ZcrConfig


@dataclass(frozen=True)
class Other:
    """A value of one field; `given` is set with and without it, so that it has something to do."""

    value: Any
    given: tuple[str, ...] = ()
    path: str = ""
    """What is set instead of the field itself, e.g. the `kind` inside it."""
    refuses: bool = False
    """One of the two values is refused, and that is the effect."""


@dataclass(frozen=True)
class Case:
    """One configuration class: where it stands, and what else its fields may be."""

    config: type
    stage: str
    """Which stage runs: `sids`, `losses`, `vectors`, `teacher`, `encoder` or `score`."""
    at: str = ""
    """Path of the class in the stage's configuration; empty for the top."""
    given: tuple[str, ...] = ()
    """Set in every run."""
    others: Mapping[str, Other] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    """Fields that change no result, with the reason."""

    @property
    def name(self) -> str:
        """How the case is called in reports."""
        place = self.at.rpartition(".")[2]
        return f"{self.config.__name__.removesuffix('Config')}@{place or self.stage}"


SMALL = ("quantizer.levels=2", "quantizer.codebook_size=8")
SHAPE = {
    "levels": Other(3),
    "codebook_size": Other(6),
    "sizes": Other([8, 5]),
    "max_train_vectors": Other(60),
}
CLUSTERS = {
    **SHAPE,
    "iterations": Other(1),
    "init": Other("k-means++"),
    "max_points_per_code": Other(4),
}


def quantizer(config: type, kind: str, *given: str, **others: Other) -> Case:
    """A quantizer with the common fields already stated."""
    return Case(
        config, "sids", "quantizer", (f"quantizer.kind={kind}", *SMALL, *given), {**SHAPE, **others}
    )


def clustering(config: type, kind: str, *given: str, **others: Other) -> Case:
    """A quantizer that clusters."""
    return quantizer(config, kind, *given, **{**CLUSTERS, **others})


RQ_VAE = (
    "quantizer.kind=rq_vae",
    *SMALL,
    "quantizer.hidden=[12]",
    "quantizer.latent_dim=6",
    "quantizer.max_steps=10",
    "quantizer.batch_size=64",
    "quantizer.pair_batch_size=32",
    "quantizer.selection.checks=0",
)
PLAIN = "quantizer.alignment.kind=none"
GRADIENT = "quantizer.ema=false"
DYING = (
    "quantizer.codebook_size=32",
    "quantizer.kmeans_init=false",
    "quantizer.assignment.kind=nearest",
    "quantizer.restart_every=2",
)
SELECTING = ("quantizer.selection.checks=3", "quantizer.max_steps=30", "quantizer.lr=0.03")

MOVING = (
    "quantizer.lr=0.1",
    "quantizer.kmeans_init=false",
    "quantizer.max_steps=40",
    # A strong pull holds the first groups together for ever.
    "quantizer.diversity.weight=0.001",
)

QUANTIZERS = (
    clustering(RqKmeansConfig, "rq_kmeans", balanced_last=Other(True)),
    clustering(OpqConfig, "opq", rotations=Other(2)),
    clustering(PsrqConfig, "psrq", prefix_weight=Other(1.0)),
    clustering(
        RqOpqConfig,
        "rq_opq",
        "quantizer.levels=3",
        levels=Other(4),
        sizes=Other([8, 5, 5]),
        blocks=Other(1),
        rotations=Other(2),
    ),
    quantizer(
        PrqKmeansConfig,
        "prq_kmeans",
        iterations=Other(1),
        sharpness=Other(2.0),
        max_points_per_code=Other(4),
    ),
    quantizer(RandomConfig, "random"),
    quantizer(
        FsqConfig,
        "fsq",
        "quantizer.max_steps=6",
        "quantizer.hidden=[8]",
        variant=Other("residual"),
        scalars=Other([3, 3]),
        hidden=Other([5]),
        kmeans_iterations=Other(1, ("quantizer.variant=rq_last",)),
        batch_size=Other(32),
        epochs=Other(1, ("quantizer.batch_size=64",)),
        max_steps=Other(3),
        lr=Other(0.02),
    ),
    quantizer(
        ShuffledConfig,
        "shuffled",
        shuffle_seed=Other(1),
        of=Other("random", path="of.kind"),
    ),
    quantizer(
        RqVaeConfig,
        "rq_vae",
        *RQ_VAE,
        hidden=Other([9]),
        latent_dim=Other(5),
        unit_variance=Other(False),
        commitment=Other("residual", (GRADIENT,)),
        commitment_loss=Other("cosine"),
        encoder_commitment=Other(0.1),
        codebook_commitment=Other(0.1, (GRADIENT,)),
        reconstruction=Other("cosine"),
        reconstruction_temperature=Other(0.5, ("quantizer.reconstruction=contrastive",)),
        rotation_trick=Other(True),
        random_depth=Other(1.0),
        assignment=Other("nearest", path="assignment.kind"),
        kmeans_init=Other(False),
        kmeans_vectors=Other(16),
        dead_code_restart=Other(False, DYING),
        restart_every=Other(5, DYING),
        ema=Other(False),
        ema_decay=Other(0.5),
        alignment=Other("none", path="alignment.kind"),
        mixing=Other("masked"),
        pair_share=Other(0.3),
        pair_batch_size=Other(16),
        batch_size=Other(32),
        epochs=Other(1, (PLAIN,)),
        max_steps=Other(7),
        lr=Other(0.01),
        min_lr=Other(0.003),
        warmup=Other(0.5),
        weight_decay=Other(0.5),
        clip_norm=Other(0.01),
        precision=Other("bf16"),
    ),
)

RQ_VAE_PARTS = (
    Case(NearestConfig, "sids", "quantizer.assignment", RQ_VAE),
    Case(
        SinkhornConfig,
        "sids",
        "quantizer.assignment",
        RQ_VAE,
        {"iterations": Other(1), "sharpness": Other(2.0)},
    ),
    Case(
        sinkhorn.SinkhornLastConfig,
        "sids",
        "quantizer.assignment",
        (*RQ_VAE, "quantizer.assignment.kind=sinkhorn_last"),
        {"iterations": Other(1), "epsilon": Other(0.5)},
    ),
    Case(
        SelectionConfig,
        "sids",
        "quantizer.selection",
        (*RQ_VAE, *SELECTING),
        {
            "checks": Other(0),
            "metric": Other("uniqueness"),
            "max_items": Other(40),
            "max_users": Other(20),
        },
    ),
    Case(
        DiversityConfig,
        "sids",
        "quantizer.diversity",
        (*RQ_VAE, GRADIENT, "quantizer.diversity.weight=1", "quantizer.diversity.groups=4"),
        {
            "weight": Other(0.0),
            "groups": Other(2),
            "temperature": Other(0.1),
            "every": Other(2, MOVING),
        },
    ),
    Case(
        HamrConfig,
        "sids",
        "quantizer.hamr",
        (*RQ_VAE, "quantizer.hamr.weight=1"),
        {
            "weight": Other(0.0),
            "full_weight": Other(1.0),
            "part_weight": Other(1.0),
            "full_margin": Other(0.05),
            "part_margin": Other(0.05),
            "part_distance": Other(2),
        },
    ),
)


def alignment(config: type, kind: str, *given: str, **others: Other) -> Case:
    """A kind of alignment, in the RQ-VAE that trains with it."""
    at = "quantizer.alignment"
    return Case(config, "sids", at, (*RQ_VAE, f"{at}.kind={kind}", *given), others)


TEACHER = ("quantizer.alignment.teacher.kind=ppmi_svd", "quantizer.alignment.teacher.dim=6")
DAS = (
    "quantizer.alignment.teacher.dim=6",
    "quantizer.alignment.teacher.epochs=1",
    "quantizer.alignment.users.codebook_size=6",
    "quantizer.alignment.users.latent_dim=6",
    "quantizer.alignment.users.hidden=[8]",
)
TERM = "quantizer.alignment.terms.a"
TERMS_TEACHER = (
    "quantizer.alignment.teacher.one.kind=ppmi_svd",
    "quantizer.alignment.teacher.one.dim=6",
    "quantizer.alignment.teacher.two.kind=ppmi_svd",
    "quantizer.alignment.teacher.two.dim=6",
    "quantizer.alignment.teacher.two.window=1",
)
TEACHING = (f"{TERM}.positive=teacher", f"{TERM}.pairing=own", f"{TERM}.teacher=one")

ALIGNMENTS = (
    alignment(presets.NoAlignmentConfig, "none"),
    alignment(
        presets.TermsConfig,
        "terms",
        f"{TERM}.source=swing",
        "quantizer.alignment.terms.b.source=co_occurrence",
        *TERMS_TEACHER,
        terms=Other("z", path="terms.a.anchor"),
        teacher=Other(1, (*TEACHING, f"{TERM}.source=identity"), path="teacher.one.window"),
        shares=Other(9.0, path="shares.swing"),
    ),
    alignment(
        presets.ForgeI2iConfig,
        "forge_i2i",
        source=Other("swing"),
        weight=Other(0.3),
        temperature=Other(0.5),
        max_scale=Other(2.0),
        normalize_inputs=Other(False),
        mask_false_negatives=Other(False),
    ),
    alignment(
        presets.LetterCfConfig,
        "letter_cf",
        *TEACHER,
        teacher=Other(1, path="teacher.window"),
        weight=Other(0.5),
        projector=Other("linear"),
    ),
    alignment(
        presets.CoOccurrenceConfig,
        "co_occurrence",
        source=Other("semantic_knn"),
        attach=Other("z"),
        weight=Other(0.3),
        temperature=Other(0.5),
        learn_temperature=Other(True),
        mask=Other("none"),
    ),
    alignment(
        presets.RlmRecConfig,
        "rlmrec",
        *TEACHER,
        teacher=Other(1, path="teacher.window"),
        weight=Other(0.5),
        temperature=Other(0.5),
        projector=Other("linear"),
    ),
    alignment(
        presets.DasConfig,
        "das",
        *DAS,
        teacher=Other(1, path="teacher.seed"),
        views=Other([1, 2]),
        weight=Other(0.1),
        temperature=Other(0.5),
        attach=Other("z"),
        projector=Other("linear"),
        mask_false_negatives=Other(False),
    ),
    # The teacher is frozen, so users share no weight with items: no item's code can move. What
    # moves is the loss that is reported.
    Case(
        UserTokenizerConfig,
        "losses",
        "quantizer.alignment.users",
        (*RQ_VAE, "quantizer.alignment.kind=das", *DAS, "quantizer.alignment.projector=linear"),
        {
            "levels": Other(2),
            "codebook_size": Other(4),
            "latent_dim": Other(5, ("quantizer.alignment.views=[1,2,3,4]",)),
            "hidden": Other([5]),
            "commitment": Other(2.0),
            "ema_decay": Other(0.5),
            "weight": Other(0.2),
        },
    ),
    Case(
        TermConfig,
        "sids",
        TERM,
        (*RQ_VAE, "quantizer.alignment.kind=terms", f"{TERM}.weight=1", *TERMS_TEACHER),
        {
            "anchor": Other("z"),
            "positive": Other("z"),
            "source": Other("swing"),
            "teacher": Other("two", TEACHING),
            "pairing": Other("own", (f"{TERM}.anchor=z",)),
            "ends": Other("both"),
            "symmetric": Other(True),
            "similarity": Other("dot"),
            "temperature": Other(0.5),
            "learn_temperature": Other(True),
            "max_scale": Other(2.0, (f"{TERM}.learn_temperature=true",)),
            "mask": Other("known"),
            "projector": Other("linear"),
            "weight": Other(0.3),
            "final_weight": Other(0.0),
            "start": Other(0.5),
        },
    ),
)

FULL = ("quantizer.levels=2", "quantizer.codebook_size=6")


def resolver(config: type, kind: str, *given: str, **others: Other) -> Case:
    """A resolver on a table with many collisions."""
    return Case(config, "sids", "resolver", (*FULL, f"resolver.kind={kind}", *given), others)


CAPS = {"cap": Other(4), "candidates": Other(1), "order": Other("priority")}
RESOLVERS = (
    resolver(BucketConfig, "bucket"),
    resolver(ExtraTokenConfig, "extra_token"),
    resolver(PopRankConfig, "pop_rank"),
    resolver(KnnCapConfig, "knn_cap", "resolver.cap=3", **CAPS),
    resolver(RandomCapConfig, "random_cap", "resolver.cap=3", **CAPS, seed=Other(1)),
    resolver(ZcrConfig, "zcr"),
    resolver(
        SinkhornLastConfig,
        "sinkhorn_last",
        "quantizer.codebook_size=16",
        epsilon=Other(2.0),
        iterations=Other(1),
    ),
)

ADAPTING = ("adapter.rank=2", "adapter.steps=4", "adapter.batch_size=32")
FUSING = ("behaviour.alpha=0.5", "behaviour.dim=5")
SMOOTHING = ("smooth.gamma=0.5",)
VECTORS = (
    Case(
        VectorsConfig,
        "vectors",
        others={
            "space": Other("other"),
            "side": Other(["brand"], ADAPTING[1:]),
            "counts": Other("swing", FUSING, path="counts.kind"),
        },
    ),
    Case(WindowCountsConfig, "vectors", "counts", FUSING, {"window": Other(1)}),
    Case(
        SwingCountsConfig,
        "vectors",
        "counts",
        ("counts.kind=swing", *FUSING),
        {"smoothing": Other(20.0), "max_history": Other(3), "max_users": Other(3)},
    ),
    Case(
        GraphSmoothConfig,
        "vectors",
        "smooth",
        SMOOTHING,
        {"gamma": Other(0.1), "graph": Other("knn"), "neighbours": Other(2)},
    ),
    Case(
        AdapterConfig,
        "vectors",
        "adapter",
        ADAPTING,
        {
            "rank": Other(3),
            "steps": Other(2),
            "batch_size": Other(16),
            "learning_rate": Other(0.05),
            "temperature": Other(0.5),
            "seed": Other(1),
        },
    ),
    Case(BehaviourConfig, "vectors", "behaviour", FUSING, {"alpha": Other(0.2), "dim": Other(3)}),
)

TEACHES = {"dim": Other(5), "max_users": Other(40)}
SASREC = {
    "layers": Other(1),
    "heads": Other(1),
    "dropout": Other(0.1),
    "max_length": Other(2),
    "epochs": Other(1, ("holdout_share=0",)),
    "patience": Other(1, ("epochs=12", "patience=8", "learning_rate=0.3")),
    "holdout_share": Other(0.4),
    "batch_users": Other(16),
    "learning_rate": Other(0.05),
    "weight_decay": Other(0.5),
    "negatives": Other(3),
    "seed": Other(1),
}
TEACHERS = (
    Case(PpmiSvdConfig, "teacher", given=("dim=6",), others={**TEACHES, "window": Other(1)}),
    Case(
        SasRecTeacherConfig,
        "teacher",
        given=("dim=6", "epochs=2"),
        others={**TEACHES, "dim": Other(4), **SASREC},
    ),
    Case(
        TwoTowerConfig,
        "teacher",
        given=("dim=6", "epochs=2"),
        others={
            **TEACHES,
            "hidden": Other(7),
            "temperature": Other(0.5),
            "orthogonality": Other(9.0),
            "popularity": Other(9.0),
            "epochs": Other(1),
            "patience": Other(1, ("epochs=30", "patience=20", "learning_rate=0.3")),
            "holdout_share": Other(0.4),
            "batch_events": Other(64),
            "learning_rate": Other(0.05),
            "seed": Other(1),
        },
    ),
)
"""`SasRecConfig` is the teacher's own base: its fields are walked there."""

ACTORS = {
    "local_items": "equal here and on Ray (tests/embed/encoders/test_stage.py)",
    "shard_rows": "how much a killed stage loses",
    "batch_size": "rows at once, equal up to rounding",
    "max_actors": "bounds the cluster's work",
    "cpus_per_actor": "resources",
    "gpus_per_actor": "resources",
}
ENCODES = {
    "model": Other("MODEL2"),
    "revision": Other("v2", refuses=True),
    "name": Other("another"),
    "normalize": Other(False),
    "precision": Other("bfloat16"),
    "storage": Other("float32"),
}
ENCODERS = (
    Case(
        TextConfig,
        "encoder",
        given=("model=MODEL", "storage=float32"),
        others={
            **ENCODES,
            "storage": Other("float16"),
            "columns": Other(["brand"]),
            "missing": Other("zero", ("columns=[note]",), refuses=True),
            "separator": Other(" hair ", ("columns=[title,brand]",)),
            "prefix": Other("red "),
            "pooling": Other("cls"),
            "max_tokens": Other(3),
        },
        running=ACTORS,
    ),
    Case(
        ImageConfig,
        "encoder",
        given=("model=VISION", "root=PICTURES", "storage=float32"),
        others={
            **ENCODES,
            "model": Other("VISION2"),
            "storage": Other("float16"),
            "columns": Other(["second_path"]),
            "missing": Other("zero", ("columns=[note]",), refuses=True),
            "root": Other("PICTURES2"),
        },
        running=ACTORS,
    ),
)

PARALLEL = ("parallel.steps=3", "parallel.users=20", "parallel.width=8", "parallel.heads=2")
SCORES = (
    Case(
        ScoreConfig,
        "score",
        others={
            "space": Other("other"),
            "max_users": Other(40),
            "max_train_users": Other(40),
            "hitrate_users": Other(40),
            "hitrate_k": Other(3),
            "hitrate_history": Other(1),
            "hitrate_gallery": Other(60),
            "hitrate_exact_limit": Other(1),
            "sample_items": Other(40),
            "order_triplets": Other(100),
            "probe_history": Other(1),
            "probe_window": Other(1),
            "probe_decay": Other(0.1),
            "probe_steps": Other(1),
            "tail_max_count": Other(12),
            "seed": Other(1),
        },
        running={"hitrate_shard": "same result by shards (tests/sid/test_score.py)"},
    ),
    Case(
        ParallelConfig,
        "score",
        "parallel",
        PARALLEL,
        {
            "steps": Other(4),
            "batch_users": Other(9),
            "history": Other(2),
            "width": Other(16),
            "layers": Other(1),
            "heads": Other(1),
            "dropout": Other(0.5),
            "temperature": Other(0.5),
            "learning_rate": Other(0.1),
            "users": Other(10),
            "k": Other(3),
        },
    ),
)

SPREAD = (
    Case(
        SidConfig,
        "sids",
        given=SMALL,
        others={
            "quantizer": Other("random", path="quantizer.kind"),
            "resolver": Other("extra_token", path="resolver.kind"),
            "seed": Other(1),
        },
    ),
    Case(
        EncodeConfig,
        "sids",
        "encode",
        running={
            "local_items": "encoding on Ray equals encoding here (tests/sid/test_fit.py)",
            "max_actors": "bounds the cluster's work",
            "cpus_per_actor": "resources",
            "gpus_per_actor": "resources",
            "batch_rows": "a row's codes are its own (quantizer contract)",
        },
    ),
    Case(
        TrainConfig,
        "sids",
        "train",
        running={
            "workers": "two workers equal one (tests/sid/test_train.py)",
            "cpus_per_worker": "resources",
            "gpus_per_worker": "resources",
            "checkpoint_every": "how much a killed training repeats",
            "max_failures": "when to give up",
            "prefetch_batches": "how far reading runs ahead",
            "read_tasks": "resources",
            "read_cpus": "resources",
        },
    ),
)

CASES = (
    *QUANTIZERS,
    *RQ_VAE_PARTS,
    *ALIGNMENTS,
    *RESOLVERS,
    *VECTORS,
    *TEACHERS,
    *ENCODERS,
    *SCORES,
    *SPREAD,
)
BASES = (SasRecConfig,)
"""Concrete classes that are only ever used through a subclass walked above."""
ELSEWHERE = (AlGrExportConfig,)
"""Needs a running Ray; its fields are walked in tests/sid/test_al_gr.py."""
