"""The kinds of `quantizer.alignment`: each is a list of terms, and nothing else.

Sources are named at each kind; figures are those of the papers unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from forge_ray.config import Component
from forge_ray.embed.pairs import SOURCES
from forge_ray.embed.teachers import TeacherConfig
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.embed.teachers.sasrec import SasRecTeacherConfig
from forge_ray.embed.teachers.two_tower import TwoTowerConfig
from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import IDENTITY, INTERACTIONS
from forge_ray.sid.alignment.module import Alignment, AlignmentDims
from forge_ray.sid.alignment.terms import TermConfig
from forge_ray.sid.alignment.users import UserTokenizerConfig


@dataclass(kw_only=True)
class AlignmentConfig(Component):
    """What pulls the codes of related items together; `kind` picks one."""

    kind: str = "none"

    def __post_init__(self) -> None:
        """Check the terms and their sources, before anything is fitted for them."""
        known = (INTERACTIONS, *SOURCES)
        unknown = sorted(set(self.sources) - set(known))
        if unknown:
            raise ConfigError(
                f"alignment source must be one of {', '.join((IDENTITY, *known))}, got "
                f"{unknown[0]!r}. Choose one of them."
            )

    def list_terms(self) -> dict[str, TermConfig]:
        """The terms by name."""
        raise NotImplementedError(f"{type(self).__name__} does not list terms")

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The teachers to fit before, by the name that terms and batches use."""
        return {}

    @property
    def user_side(self) -> UserTokenizerConfig:
        """Codebooks of the user side, if terms read user codes."""
        return UserTokenizerConfig()

    @property
    def source_shares(self) -> Mapping[str, float]:
        """Relative share of the pair batches by source; 1 where it is not named."""
        return {}

    @property
    def sources(self) -> dict[str, float]:
        """Share of the pair batches (or pair rows) by pair source; sums to 1, without `identity`.

        Terms of source `identity` read the reconstruction steps' items and need no pairs.
        """
        terms = self.list_terms().values()
        names = dict.fromkeys(term.source for term in terms if term.source != IDENTITY)
        shares = {name: self.source_shares.get(name, 1.0) for name in names}
        kept = {name: share for name, share in shares.items() if share > 0}
        return {name: share / sum(kept.values()) for name, share in kept.items()}

    def read_terms(self, *, has_pairs: bool = True) -> dict[str, TermConfig]:
        """The terms whose batches occur.

        Args:
            has_pairs: whether there are pair batches; without them only items with themselves.
        """
        read = {IDENTITY, *(self.sources if has_pairs else ())}
        return {name: term for name, term in self.list_terms().items() if term.source in read}

    def read_teachers(self, *, has_pairs: bool = True) -> dict[str, TeacherConfig]:
        """The teachers that those terms read; no other need be fitted."""
        terms = self.read_terms(has_pairs=has_pairs).values()
        names = {term.teacher for term in terms if term.has_teacher}
        return {name: teacher for name, teacher in self.teachers.items() if name in names}

    def build(self, dims: AlignmentDims, *, has_pairs: bool = True) -> Alignment:
        """Make the trainable module; draws weights from torch's global generator.

        Args:
            dims: widths of what the batches will hold.
            has_pairs: as for `read_terms`; other terms are left out.

        Raises:
            ConfigError: when a term compares different widths or lacks its teacher or users.
        """
        terms = self.read_terms(has_pairs=has_pairs)
        sources = self.sources if has_pairs else {}
        return Alignment(terms, dims, sources=sources, users=self.user_side)


@dataclass(kw_only=True)
class NoAlignmentConfig(AlignmentConfig):
    """Reconstruction alone."""

    kind: Literal["none"] = "none"

    def list_terms(self) -> dict[str, TermConfig]:
        """No terms."""
        return {}


@dataclass(kw_only=True)
class TermsConfig(AlignmentConfig):
    """Any terms, by name."""

    kind: Literal["terms"] = "terms"
    terms: dict[str, TermConfig] = field(default_factory=dict)
    """The terms; a name is that of the loss in reports."""
    teacher: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by the name that `terms.*.teacher` uses."""
    shares: dict[str, float] = field(default_factory=dict)
    """Relative share of the pair batches by source; 1 for a source not named here."""
    users: UserTokenizerConfig = field(default_factory=UserTokenizerConfig)
    """Codebooks of the user side; read by terms with user codes."""

    def __post_init__(self) -> None:
        """Check that names match."""
        super().__post_init__()
        wanted = {term.teacher for term in self.terms.values() if term.has_teacher}
        missing = sorted(wanted - set(self.teacher))
        if missing:
            raise ConfigError(
                f"alignment.teacher must name {', '.join(missing)}, got "
                f"{', '.join(self.teacher) or 'none'}. Add it, or change terms.*.teacher."
            )
        if min(self.shares.values(), default=0) < 0:
            raise ConfigError(f"alignment.shares must be >= 0, got {self.shares}. Raise them.")
        unused = sorted(set(self.shares) - {term.source for term in self.terms.values()})
        if unused:
            raise ConfigError(
                f"alignment.shares must name sources of the terms, got {unused[0]!r}. Remove it, "
                "or add a term that reads it."
            )

    def list_terms(self) -> dict[str, TermConfig]:
        """The terms given."""
        return dict(self.terms)

    def build(self, dims: AlignmentDims, *, has_pairs: bool = True) -> Alignment:
        """Make the trainable module.

        Raises:
            ConfigError: when there is no term; see also `AlignmentConfig.build`.
        """
        # Not with the fields: a kind is configured before the terms that follow it.
        if not self.terms:
            raise ConfigError(
                "alignment.terms must hold a term, got none. Add one, or set alignment.kind=none."
            )
        return super().build(dims, has_pairs=has_pairs)

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The teachers given."""
        return self.teacher

    @property
    def user_side(self) -> UserTokenizerConfig:
        """Codebooks of the user side."""
        return self.users

    @property
    def source_shares(self) -> Mapping[str, float]:
        """Relative share of the pair batches by source."""
        return self.shares


@dataclass(kw_only=True)
class ForgeI2iConfig(AlignmentConfig):
    """Three symmetric terms between decoder outputs and raw inputs of item-to-item pairs.

    Quantised a with quantised b, quantised a with raw b, and quantised with its own raw input, each
    with its own learned temperature, averaged.

    Source: FORGE (arXiv 2509.20904), Eq. 2 and the public code. The bound, the normalisation of raw
    inputs and the mask of false negatives are additions; fields say FORGE's values.
    """

    kind: Literal["forge_i2i"] = "forge_i2i"
    source: str = "co_occurrence"
    """Item-to-item pairs."""
    weight: float = 1.0
    temperature: float = 0.07
    """Initial temperature of the three terms, learned from there."""
    max_scale: float | None = 100.0
    """Bound of the inverse temperature (TorchEasyRec: 100). FORGE: null."""
    normalize_inputs: bool = True
    """Contrast with unit raw inputs. FORGE: false, on inputs that are nearly unit length."""
    mask_false_negatives: bool = True
    """Leave in-batch negatives that share an item with the pair out. FORGE: false."""

    def list_terms(self) -> dict[str, TermConfig]:
        """The three terms."""
        raw: Literal["cos", "half_cos"] = "cos" if self.normalize_inputs else "half_cos"
        return {
            "self": self._term("x_hat", "pair", "cos"),
            "ori": self._term("x", "pair", raw),
            "cl": self._term("x", "own", raw),
        }

    def _term(
        self, positive: str, pairing: Literal["pair", "own"], similarity: Literal["cos", "half_cos"]
    ) -> TermConfig:
        return TermConfig(
            anchor="x_hat",
            positive=positive,
            source=self.source,
            pairing=pairing,
            ends="both",
            similarity=similarity,
            temperature=self.temperature,
            learn_temperature=True,
            max_scale=self.max_scale,
            mask="same" if self.mask_false_negatives else "none",
            weight=self.weight / 3,
        )


@dataclass(kw_only=True)
class LetterCfConfig(AlignmentConfig):
    """The codeword sum of an item finds the item's vector of a frozen sequential recommender.

    Source: LETTER (arXiv 2405.07314): dot product, no temperature, one direction, all other items
    of the batch as negatives. It needs a teacher as wide as the latents.
    """

    kind: Literal["letter_cf"] = "letter_cf"
    teacher: TeacherConfig = field(default_factory=SasRecTeacherConfig)
    """As wide as the latents, unless there is a projector; 32 in LETTER, as its latents."""
    weight: float = 0.02
    """Best of the paper; its script has 0.01."""
    projector: Literal["none", "linear", "mlp"] = "none"
    """Layer from latents to the teacher's width. LETTER: none."""

    def list_terms(self) -> dict[str, TermConfig]:
        """One term."""
        term = TermConfig(
            anchor="z_q",
            positive="teacher",
            source=IDENTITY,
            pairing="own",
            similarity="dot",
            temperature=1.0,
            mask="none",
            projector=self.projector,
            weight=self.weight,
        )
        return {"cf": term}

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The one teacher."""
        return {"teacher": self.teacher}


@dataclass(kw_only=True)
class CoOccurrenceConfig(AlignmentConfig):
    """Codeword sums of items that occur together find each other.

    Source: PLUM (arXiv 2510.07784) and COSETTE (arXiv 2508.14910). The attachment point and the
    temperature are not certain in either; both are fields.
    """

    kind: Literal["co_occurrence"] = "co_occurrence"
    source: str = "co_occurrence"
    """Item-to-item pairs."""
    attach: Literal["z", "z_q", "x_hat", "middle"] = "z_q"
    """Tensor that is compared."""
    weight: float = 1.0
    temperature: float = 0.07
    learn_temperature: bool = False
    mask: Literal["none", "same", "known"] = "same"
    """Negatives left out; see the terms."""

    def list_terms(self) -> dict[str, TermConfig]:
        """One term."""
        term = TermConfig(
            anchor=self.attach,
            positive=self.attach,
            source=self.source,
            ends="both",
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            max_scale=100.0,
            mask=self.mask,
            weight=self.weight,
        )
        return {"pairs": term}


@dataclass(kw_only=True)
class RlmRecConfig(AlignmentConfig):
    """A small network of the codeword sum finds the item's behaviour vector.

    Source: RLMRec (arXiv 2310.15950), contrastive form, with z_q in place of a text profile:
    cosine, temperature 0.2, weight 1e-2 (on Steam 0.1 and 1e-3).
    """

    kind: Literal["rlmrec"] = "rlmrec"
    teacher: TeacherConfig = field(default_factory=PpmiSvdConfig)
    """RLMRec: vectors of a graph recommender."""
    weight: float = 0.01
    temperature: float = 0.2
    projector: Literal["linear", "mlp"] = "mlp"

    def list_terms(self) -> dict[str, TermConfig]:
        """One term."""
        term = TermConfig(
            anchor="z_q",
            positive="teacher",
            source=IDENTITY,
            pairing="own",
            temperature=self.temperature,
            mask="none",
            projector=self.projector,
            weight=self.weight,
        )
        return {"con": term}

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The one teacher."""
        return {"teacher": self.teacher}


@dataclass(kw_only=True)
class DasConfig(AlignmentConfig):
    """Six views between user codes, item codes and a debiased two-tower teacher.

    1 user code → the item's teacher vector, 2 item code → the user's teacher vector, 3 user code →
    the user's, 4 item code → the item's, 5 codes of two users of one item, 6 codes of two items of
    one user. User codebooks are trained beside the items'.

    Views 1, 3 and 5 compare users with users or with the frozen teacher: they train the user
    tokenizer alone and cannot move item SIDs. Views 2, 4 and 6 move them. User SIDs are not
    exported: the user tokenizer is dropped after training.

    Source: DAS (arXiv 2508.10584), which publishes no code. Temperature and the tensor that is
    compared are not certain there, so they are fields. We differ: the teacher is fitted before and
    frozen, so its own loss is no part of the sum.
    """

    kind: Literal["das"] = "das"
    teacher: TeacherConfig = field(default_factory=TwoTowerConfig)
    """Model whose item and user vectors the codes approach."""
    users: UserTokenizerConfig = field(default_factory=UserTokenizerConfig)
    """Codebooks of the user side, for views 1, 3 and 5."""
    views: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    """Views to use, 1 to 6."""
    weight: float = 0.5
    """Of the sum of the views; β in the paper."""
    temperature: float = 0.07
    attach: Literal["z", "z_q"] = "z_q"
    """Tensor of users and items that is compared: codeword sums, or latents before them."""
    projector: Literal["none", "linear", "mlp"] = "none"
    """Layer from codes to the teacher's width in views 1 to 4."""
    mask_false_negatives: bool = True
    """Leave in-batch negatives that share an item or user with the event out."""

    def __post_init__(self) -> None:
        """Check the views."""
        # Before the terms, which are made from them.
        if not self.views or not {*self.views} <= {1, 2, 3, 4, 5, 6}:
            raise ConfigError(
                f"alignment.views must be some of 1 to 6, got {self.views}. List at least one."
            )
        super().__post_init__()

    def list_terms(self) -> dict[str, TermConfig]:
        """The views chosen."""
        user = f"user_{self.attach}"
        ends = {
            1: (user, "teacher"),
            2: (self.attach, "user_teacher"),
            3: (user, "user_teacher"),
            4: (self.attach, "teacher"),
            5: (user, user),
            6: (self.attach, self.attach),
        }
        return {f"view_{view}": self._term(*ends[view]) for view in sorted({*self.views})}

    def _term(self, anchor: str, positive: str) -> TermConfig:
        between_codes = anchor == positive
        return TermConfig(
            anchor=anchor,
            positive=positive,
            source=INTERACTIONS,
            pairing="pair" if between_codes else "own",
            ends="both" if between_codes else "one",
            temperature=self.temperature,
            mask="same" if self.mask_false_negatives else "none",
            projector="none" if between_codes else self.projector,
            weight=self.weight,
        )

    @property
    def teachers(self) -> Mapping[str, TeacherConfig]:
        """The one teacher, if a view reads it."""
        return {"teacher": self.teacher} if {*self.views} & {1, 2, 3, 4} else {}

    @property
    def user_side(self) -> UserTokenizerConfig:
        """Codebooks of the user side."""
        return self.users
