"""Constrained beam search beside `transformers.generate` of the same model, and how it scales.

One model: the default decoder (4 layers, width 128), random weights sharpened so that scores are
far apart; one published table of 47,593 items; histories drawn uniformly. The other side is
`Qwen2ForCausalLM` with one vocabulary and the same weights, and a dictionary of prefixes as
`prefix_allowed_tokens_fn`. Its softmax is restricted to the level by a processor in front of the
constraint, so that both sides rank by the same scores; the top 20 must be identical. Each side
takes the fastest of its batch sizes.

Seconds are CPU seconds of this process. Run it with `--threads 1`: on a quiet machine they are wall
seconds then, on a busy one they stay comparable.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.gr.beam import beam_search
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.models.base import Generator
from forge_ray.gr.models.decoder import Decoder, DecoderConfig
from forge_ray.gr.models.parallel_heads import ParallelHeadsConfig
from forge_ray.gr.prefix_index import PrefixIndex
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable

TABLE = Path(__file__).parents[3] / "shared" / "data" / "sid-cell-47k" / "rkmeans_native.npz"
SIZES, ITEMS = (256, 256, 256, 256), 47_593
BEAMS, TOP, TURNS = 50, 20, 3
HISTORIES = (20, 100)
OUR_BATCHES, THEIR_BATCHES = (8, 16, 32, 64), (1, 4, 16)
CATALOGUES = (10_000, 100_000, 1_000_000)


def run(scale: float) -> dict[str, Any]:
    """Both sides by history length, the mask's share, and time per user by catalogue size."""
    table = _table()
    model = _model(table)
    users = max(4, int(64 * scale))
    report: dict[str, Any] = {"items": table.num_items, "beams": BEAMS}
    for items in HISTORIES:
        report[f"{items} items"] = compare(model, table, items, users)
    report["mask_share_of_a_step"] = mask_share(model, table, users)
    report["ms_per_user_by_catalogue"] = by_catalogue(model, users)
    heads = ParallelHeadsConfig().build(vocab_of(SIZES)).eval()
    report["parallel_heads_exact_ms_per_user_by_catalogue"] = by_catalogue(heads, users)
    return report


def compare(model: Decoder, table: SidTable, items: int, users: int) -> dict[str, Any]:
    """One history length."""
    histories = _histories(table.num_items, items, users)
    ours = {}
    for size in OUR_BATCHES:
        decoder = _decoder(model, table, size)
        ours[size] = _ms_per_user(partial(decoder.decode, histories), users)
    bare = Generate(model, table)
    some = histories.take(np.arange(max(THEIR_BATCHES)))
    theirs = {
        size: _ms_per_user(lambda size=size: bare.decode(some, size), len(some), turns=2)
        for size in THEIR_BATCHES
    }
    same = decoder.decode(some).sid_rank[:, :TOP] == bare.decode(some, len(some))[:, :TOP]
    return {
        "ours_ms_per_user": ours,
        "generate_ms_per_user": theirs,
        "times_faster": round(min(theirs.values()) / min(ours.values()), 1),
        "identical_top_20": bool(same.all()),
    }


class Generate:
    """The same model as `Qwen2ForCausalLM`, decoded by `generate`."""

    def __init__(self, model: Decoder, table: SidTable) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        self.vocab, self.codes = model.vocab, table.codes
        kept = {**model.blocks.config.to_dict(), "vocab_size": self.vocab.size}
        self.bare = Qwen2ForCausalLM(Qwen2Config(**kept)).eval()
        head = torch.zeros(self.vocab.size, model.table.weight.shape[1])
        assert model.table.head is not None
        head[self.vocab.num_special :] = model.table.head.detach()
        self.bare.model.load_state_dict(
            {"embed_tokens.weight": model.table.weight.detach(), **model.blocks.state_dict()}
        )
        self.bare.lm_head.load_state_dict({"weight": head})
        self.index = PrefixIndex.build(table.codes, table.codebook_sizes)
        following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for sid in self.vocab.tokens(torch.from_numpy(table.codes.astype(np.int64))).tolist():
            for level in range(len(sid)):
                following[tuple(sid[:level])].add(sid[level])
        self.following = {prefix: sorted(codes) for prefix, codes in following.items()}

    def decode(self, histories: Ragged, batch_users: int) -> np.ndarray:
        """Ranks of the best SIDs, int64 [users, BEAMS]."""
        starts = range(0, len(histories), batch_users)
        parts = [
            self._search(histories.take(np.arange(start, start + batch_users))) for start in starts
        ]
        return torch.cat(parts).numpy()

    def _search(self, histories: Ragged) -> Tensor:
        from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

        longest = int(histories.lengths.max())
        tokens, mask = self.vocab.history_tokens(histories, self.codes, longest)
        prompt = tokens.shape[1]

        def of_level(found: Tensor, scores: Tensor) -> Tensor:
            level = found.shape[1] - prompt
            start = self.vocab.num_special + self.vocab.level_offsets[level]
            kept = slice(start, start + self.vocab.codebook_sizes[level])
            scores[:, kept] = torch.log_softmax(scores[:, kept], dim=1)
            return scores

        def allowed(_: int, sent: Tensor) -> list[int]:
            return self.following[tuple(sent[prompt:].tolist())]

        found = self.bare.generate(
            input_ids=tokens,
            attention_mask=mask.long(),
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            min_new_tokens=self.vocab.num_levels,
            max_new_tokens=self.vocab.num_levels,
            do_sample=False,
            # What `prefix_allowed_tokens_fn=allowed` would build, behind the level's softmax.
            logits_processor=LogitsProcessorList(
                [of_level, PrefixConstrainedLogitsProcessor(allowed, BEAMS)]
            ),
            pad_token_id=0,
        )
        offsets = torch.tensor(self.vocab.level_offsets) + self.vocab.num_special
        return self.index.find(found[:, prompt:] - offsets).reshape(len(histories), BEAMS)


@torch.no_grad()
def mask_share(model: Decoder, table: SidTable, users: int) -> float:
    """Time inside the prefix index as a share of the search's steps, at 20 items.

    The step that reads the history is left out of the whole, which makes the share larger.
    """
    spent = 0.0

    class Timed(PrefixIndex):
        def children(self, level: int, parent_rows: Tensor) -> Any:
            nonlocal spent
            started = time.process_time()
            found = super().children(level, parent_rows)
            spent += time.process_time() - started
            return found

    histories = _histories(table.num_items, HISTORIES[0], users)
    tokens, mask = model.vocab.history_tokens(histories, table.codes, HISTORIES[0])
    index = Timed(PrefixIndex.build(table.codes, table.codebook_sizes).levels)
    beam_search(model, tokens, mask, index, (BEAMS,) * 4)
    reading = _ms_per_user(lambda: model.prefill(tokens, mask), 1)
    spent = 0.0
    whole = _ms_per_user(lambda: beam_search(model, tokens, mask, index, (BEAMS,) * 4), 1, turns=1)
    return round(1e3 * spent / (whole - reading), 4)


def by_catalogue(model: Generator, users: int) -> dict[str, float]:
    """Milliseconds per user on random codes in catalogues of growing size, 20 items of history."""
    found = {}
    for size in CATALOGUES:
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 256, (size, 4)).astype(np.uint16)
        table = SidTable.from_codes(codes, SIZES)
        histories = _histories(size, HISTORIES[0], users)
        decoder = _decoder(model, table, 32)
        found[f"{size:,}"] = _ms_per_user(partial(decoder.decode, histories), users)
    return found


def _table() -> SidTable:
    if TABLE.is_file():
        return SidTable.from_npz(TABLE)
    rng = np.random.default_rng(0)
    return SidTable.from_codes(rng.integers(0, 256, (ITEMS, 4)).astype(np.uint16), SIZES)


@torch.no_grad()
def _model(table: SidTable) -> Decoder:
    torch.manual_seed(0)
    model = DecoderConfig().build(vocab_of(table.codebook_sizes)).eval()
    for parameter in model.table.parameters():
        parameter.mul_(20.0)
    return model


def _histories(num_items: int, length: int, users: int) -> Ragged:
    rng = np.random.default_rng(length)
    return Ragged.from_lists(rng.integers(0, num_items, (users, length)), np.int64)


def _decoder(model: Generator, table: SidTable, batch_users: int) -> SidDecoder:
    return SidDecoder(
        model,
        table,
        widths=(BEAMS,) * table.num_levels,
        max_history=max(HISTORIES),
        batch_users=batch_users,
    )


def _ms_per_user(work: Callable[[], object], users: int, *, turns: int = TURNS) -> float:
    """Fastest of several turns."""
    seconds = []
    for _ in range(turns):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return round(1e3 * min(seconds) / users, 2)
