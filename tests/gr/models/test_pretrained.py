"""Generators from checkpoints: the contract, equality with transformers, prompts, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from forge_ray.config import from_mapping, load_config, to_mapping
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.base import Generator, GeneratorConfig, TokenBatch
from forge_ray.gr.models.pretrained import PretrainedConfig
from forge_ray.gr.models.pretrained_decoder import PretrainedDecoderConfig
from forge_ray.gr.models.pretrained_t5 import PretrainedT5Config
from forge_ray.gr.models.prompt import PromptConfig
from forge_ray.gr.vocab import Vocab
from tests.gr.models.checkpoints import (
    llama_checkpoint,
    qwen_checkpoint,
    t5_checkpoint,
    teach_codes,
)
from tests.gr.models.test_generators import SIZES, GeneratorContract

PROMPT = PromptConfig(before="history: ", after=", next:")
CHAT = PromptConfig(system="推荐", before="历史：", after="，下一步", chat=True)
FORGE = {"prompt": CHAT, "targets": "last", "softmax": "full", "end_token": True}


class PretrainedContract(GeneratorContract):
    """The contract of every generator, by a model that starts from a checkpoint's weights."""

    folder: Path
    is_last = True

    def resolved(self) -> PretrainedConfig:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _checkpoint(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def config(self) -> GeneratorConfig:
        if not (self.folder / "config.json").is_file():
            self.save(self.folder)
        return self.resolved()

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def model(self, config: GeneratorConfig | None = None) -> Generator:
        torch.manual_seed(0)
        return (config or self.config()).start(Vocab(SIZES)).eval()

    def charge_last_item(self, model: Generator, codes: torch.Tensor) -> torch.Tensor:
        if not self.is_last:
            return super().charge_last_item(model, codes)
        return model.loss_sum(TokenBatch(codes, torch.full((len(codes),), codes.shape[1])))


class TestTiedQwen(PretrainedContract):
    is_last = False

    def save(self, folder: Path) -> None:
        qwen_checkpoint(folder)

    def resolved(self) -> PretrainedConfig:
        return PretrainedDecoderConfig(pretrained=str(self.folder)).resolved()


class TestUntiedLlama(PretrainedContract):
    is_last = False

    def save(self, folder: Path) -> None:
        llama_checkpoint(folder)

    def resolved(self) -> PretrainedConfig:
        return PretrainedDecoderConfig(pretrained=str(self.folder)).resolved()


class TestPromptedLlama(TestUntiedLlama):
    is_last = True

    def resolved(self) -> PretrainedConfig:
        return PretrainedDecoderConfig(
            pretrained=str(self.folder), prompt=PROMPT, targets="last"
        ).resolved()


class TestChattingQwen(PretrainedContract):
    def save(self, folder: Path) -> None:
        qwen_checkpoint(folder, is_tied=False)

    def resolved(self) -> PretrainedConfig:
        return PretrainedDecoderConfig(
            pretrained=str(self.folder), prompt=CHAT, targets="last"
        ).resolved()


class TestTiedT5(PretrainedContract):
    def save(self, folder: Path) -> None:
        t5_checkpoint(folder)

    def resolved(self) -> PretrainedConfig:
        return PretrainedT5Config(
            pretrained=str(self.folder), prompt=PROMPT, dropout=0.0
        ).resolved()


class TestGatedT5(PretrainedContract):
    def save(self, folder: Path) -> None:
        t5_checkpoint(folder, is_gated=True)

    def resolved(self) -> PretrainedConfig:
        return PretrainedT5Config(pretrained=str(self.folder), dropout=0.0).resolved()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_checkpoint(tmp_path_factory.mktemp("t5"))


def started(config: PretrainedConfig) -> Generator:
    torch.manual_seed(0)
    return config.resolved().start(Vocab(SIZES)).eval()


def a_batch() -> TokenBatch:
    draw = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randint(k, (3, 4), generator=draw) for k in SIZES], dim=2)
    return TokenBatch(codes, torch.tensor([4, 2, 3]))


def codes_in(model: Generator, codes: torch.Tensor, num_text: int) -> list[int]:
    """Codes [N, L] as ids of a transformers model whose vocabulary was extended by ours."""
    return (model.vocab.tokens(codes) + num_text).flatten().tolist()


def rows_of(model: Generator, num_text: int) -> torch.Tensor:
    """Our embedding rows in the order of such a model: text first, then specials and codes."""
    size = model.vocab.size
    weight = model.table.weight.detach()
    return torch.cat([weight[size : size + num_text], weight[:size]])


class TestTransformers:
    """The same model, extended by transformers' own means, charges the same."""

    @torch.no_grad()
    def test_qwen_with_chat_and_end_token(self, qwen):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        config = PretrainedDecoderConfig(pretrained=str(qwen), **FORGE)
        model, batch = started(config), a_batch()
        theirs = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(qwen)
        num_text = theirs.config.vocab_size
        rows = rows_of(model, num_text)
        theirs.resize_token_embeddings(len(rows))
        theirs.get_input_embeddings().weight.copy_(rows)
        theirs.eval()
        total = 0.0
        for codes, length in zip(batch.codes, batch.lengths, strict=True):
            text = (
                "<|im_start|>system\n推荐<|im_end|>\n<|im_start|>user\n历史：",
                "，下一步<|im_end|>\n<|im_start|>assistant\n",
            )
            before, after = (tokenizer(side)["input_ids"] for side in text)
            answer = [*codes_in(model, codes[length - 1 : length], num_text), 2]
            question = before + codes_in(model, codes[: length - 1], num_text) + after
            # Specials compete with transformers and not with us: they are taken out.
            logits = theirs(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
            logits[:, num_text : num_text + model.vocab.num_special] = -torch.inf
            total -= logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
        assert torch.allclose(model.loss_sum(batch), total, atol=1e-3)
        assert model.num_targets(batch.lengths) == 3 * (len(SIZES) + 1)

    @torch.no_grad()
    @pytest.mark.parametrize("is_gated", [False, True])
    def test_t5_with_prompt_and_end_token(self, tmp_path, is_gated):
        from transformers import AutoTokenizer, T5ForConditionalGeneration

        t5_checkpoint(tmp_path, is_gated=is_gated)
        config = PretrainedT5Config(
            pretrained=str(tmp_path), prompt=PROMPT, softmax="full", end_token=True
        )
        model, batch = started(config), a_batch()
        theirs = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        num_text = theirs.config.vocab_size
        head = theirs.get_output_embeddings().weight.clone()
        rows = rows_of(model, num_text)
        theirs.resize_token_embeddings(len(rows))
        theirs.get_input_embeddings().weight.copy_(rows)
        if is_gated:
            own = model.table.head[:-num_text]
            bare = torch.zeros(model.vocab.num_special, own.shape[1])
            theirs.lm_head.weight = torch.nn.Parameter(torch.cat([head, bare, own]))
        total = 0.0
        for codes, length in zip(batch.codes, batch.lengths, strict=True):
            before, after = (tokenizer(side)["input_ids"] for side in (PROMPT.before, PROMPT.after))
            answer = torch.tensor([[*codes_in(model, codes[length - 1 : length], num_text), 1]])
            question = before + codes_in(model, codes[: length - 1], num_text) + after + [1]
            logits = theirs(torch.tensor([question]), labels=answer).logits[0]
            logits[:, num_text : num_text + model.vocab.num_special] = -torch.inf
            total -= logits.log_softmax(-1)[torch.arange(answer.shape[1]), answer[0]].sum()
        assert torch.allclose(model.loss_sum(batch), total, atol=1e-3)


class TestCheckpointThatKnowsCodes:
    """As FORGE publishes its own: C0, C1, … are tokens already."""

    def text(self, model: Generator, codes: torch.Tensor) -> str:
        flat = model.vocab.tokens(codes).flatten() - model.vocab.num_special
        return "".join(f"C{code}" for code in flat.tolist())

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["qwen", "t5"])
    def test_it_charges_what_transformers_charges(self, tmp_path, name):
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        is_t5 = name == "t5"
        folder = teach_codes((t5_checkpoint if is_t5 else qwen_checkpoint)(tmp_path), sum(SIZES))
        options = {"softmax": "full", "end_token": True, "prompt": PROMPT}
        config = (
            PretrainedT5Config(pretrained=str(folder), **options)
            if is_t5
            else PretrainedDecoderConfig(pretrained=str(folder), targets="last", **options)
        )
        model, batch = started(config), a_batch()
        kind = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
        theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        num_known = len(tokenizer)  # transformers' padding rows compete with no one here
        total = 0.0
        for codes, length in zip(batch.codes, batch.lengths, strict=True):
            question = PROMPT.before + self.text(model, codes[: length - 1]) + PROMPT.after
            asked = tokenizer(question)["input_ids"]
            answer = tokenizer(self.text(model, codes[length - 1 : length]))["input_ids"]
            answer += [tokenizer.eos_token_id]
            assert len(answer) == len(SIZES) + 1
            if is_t5:
                asked = torch.tensor([[*asked, tokenizer.eos_token_id]])
                logits = theirs(asked, labels=torch.tensor([answer])).logits[0]
            else:
                whole = torch.tensor([[0, *asked, *answer]])  # 0 is the checkpoint's own first one
                logits = theirs(whole).logits[0, len(asked) : -1]
            log_probs = logits[:, :num_known].log_softmax(-1)
            total -= log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum()
        assert torch.allclose(model.loss_sum(batch), total, atol=1e-3)

    def test_a_table_with_more_codes_is_refused(self, tmp_path):
        folder = teach_codes(qwen_checkpoint(tmp_path), sum(SIZES) - 1)
        config = PretrainedDecoderConfig(pretrained=str(folder)).resolved()
        assert config.checkpoint.num_codes == sum(SIZES) - 1
        with pytest.raises(ConfigError, match="must know 18 code tokens or none, got 17"):
            config.start(Vocab(SIZES))


class TestStart:
    def test_codes_begin_at_the_mean_of_the_text(self, llama):
        model = started(PretrainedDecoderConfig(pretrained=str(llama)))
        for own in (model.table.weight, model.table.head):
            text = own[-model.table.num_text :]
            codes = own[5 : len(own) - len(text)]
            assert torch.allclose(codes, text.mean(dim=0).expand_as(codes), atol=1e-4)
            assert codes.std(dim=0).min() > 0  # or no two codes would ever part

    def test_bos_continues_the_checkpoint_s(self, llama):
        model = started(PretrainedDecoderConfig(pretrained=str(llama)))
        size = model.vocab.size
        assert torch.equal(model.table.weight[1], model.table.weight[size + 1])

    def test_fresh_weights_are_not_the_checkpoint_s(self, qwen):
        given = PretrainedDecoderConfig(pretrained=str(qwen), fresh=True)
        fresh, loaded = started(given), started(PretrainedDecoderConfig(pretrained=str(qwen)))
        assert {name: one.shape for name, one in fresh.state_dict().items()} == {
            name: one.shape for name, one in loaded.state_dict().items()
        }
        assert not torch.equal(fresh.blocks.layers[0].mlp.up_proj.weight,
                               loaded.blocks.layers[0].mlp.up_proj.weight)  # fmt: skip

    def test_the_checkpoint_is_not_needed_afterwards(self, tmp_path):
        folder = qwen_checkpoint(tmp_path / "gone")
        given = GrConfig(model=PretrainedDecoderConfig(pretrained=str(folder), **FORGE).resolved())
        model = given.model.start(Vocab(SIZES)).eval()
        for path in folder.iterdir():
            path.unlink()
        again = from_mapping(GrConfig, json.loads(json.dumps(to_mapping(given))))
        assert again == given
        rebuilt = again.model.build(Vocab(SIZES))
        rebuilt.load_state_dict(model.state_dict())
        batch = a_batch()
        assert torch.equal(rebuilt.eval().loss(batch), model.loss(batch))

    def test_another_checkpoint_gives_another_identity(self, qwen, tmp_path):
        other = qwen_checkpoint(tmp_path, seed=1)
        identities = [
            GrConfig(model=PretrainedDecoderConfig(pretrained=str(one)).resolved()).identity()
            for one in (qwen, other)
        ]
        prints = [one["model"]["checkpoint"]["fingerprint"] for one in identities]
        assert prints[0] != prints[1]

    def test_a_checkpoint_that_changed_is_refused(self, tmp_path):
        config = PretrainedDecoderConfig(pretrained=str(qwen_checkpoint(tmp_path))).resolved()
        qwen_checkpoint(tmp_path, seed=1)
        with pytest.raises(ConfigError, match="must be the same checkpoint on every node"):
            config.start(Vocab(SIZES))


class TestOptions:
    def loss(self, folder: Path, **options) -> float:
        torch.manual_seed(1)
        model = started(PretrainedDecoderConfig(pretrained=str(folder), **options)).train()
        with torch.no_grad():
            model.table.weight.normal_()
        return model.loss(a_batch()).item()

    def test_every_option_changes_the_loss(self, qwen):
        last = {"targets": "last"}
        full = {**last, "softmax": "full"}
        losses = [
            self.loss(qwen),
            self.loss(qwen, dropout=0.5),
            self.loss(qwen, fresh=True),
            self.loss(qwen, **last),
            self.loss(qwen, **last, prompt=PromptConfig(before="a")),
            self.loss(qwen, **last, prompt=PromptConfig(after="a")),
            self.loss(qwen, **last, prompt=PromptConfig(before="a", chat=True)),
            self.loss(qwen, **last, prompt=PromptConfig(system="b", before="a", chat=True)),
            self.loss(qwen, **full),
            self.loss(qwen, **full, end_token=True),
            self.loss(qwen, **full, end_token=True, label_smoothing=0.1),
        ]
        assert len({round(one, 5) for one in losses}) == len(losses)


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["end_token=true"], r"end_token must be false with model\.softmax=level"),
            (["prompt.before=x"], r"targets must be last with model\.prompt"),
            (
                ["softmax=full", "end_token=true"],
                r"targets must be last with model\.end_token",
            ),
            (["prompt.system=x"], r"prompt\.system must be empty without"),
        ],
    )
    def test_rules(self, overrides, message):
        with pytest.raises(ConfigError, match=message):
            load_config(PretrainedDecoderConfig, overrides=overrides)

    def test_t5_does_not_chat(self):
        with pytest.raises(ConfigError, match=r"prompt\.chat must be false for T5"):
            load_config(PretrainedT5Config, overrides=["prompt.chat=true"])

    def test_a_checkpoint_must_be_named(self):
        with pytest.raises(ConfigError, match=r"model\.pretrained must name a checkpoint"):
            PretrainedDecoderConfig().resolved()

    def test_it_must_exist(self, tmp_path):
        with pytest.raises(ConfigError, match=r"folder with config\.json"):
            PretrainedDecoderConfig(pretrained=str(tmp_path)).resolved()

    def test_a_folder_has_no_revision(self, qwen):
        with pytest.raises(ConfigError, match="revision must be empty for a folder"):
            PretrainedDecoderConfig(pretrained=str(qwen), revision="main").resolved()

    def test_it_must_be_of_the_architecture(self, t5, qwen):
        with pytest.raises(ConfigError, match=r"type qwen2 or llama for .*, got t5"):
            PretrainedDecoderConfig(pretrained=str(t5)).resolved()
        with pytest.raises(ConfigError, match=r"type t5 for .*, got qwen2"):
            PretrainedT5Config(pretrained=str(qwen)).resolved()

    def test_chat_needs_a_template(self, llama):
        config = PretrainedDecoderConfig(pretrained=str(llama), prompt=CHAT, targets="last")
        with pytest.raises(ConfigError, match="tokenizer without a chat template"):
            config.resolved()

    def test_weights_must_load(self, tmp_path):
        folder = qwen_checkpoint(tmp_path)
        (folder / "model.safetensors").write_bytes(b"nothing of the kind")
        config = PretrainedDecoderConfig(pretrained=str(folder)).resolved()
        with pytest.raises(ConfigError, match="must be a checkpoint with a tokenizer"):
            config.start(Vocab(SIZES))

    def test_a_config_that_was_not_resolved_does_not_build(self, qwen):
        with pytest.raises(ConfigError, match="Call `resolved"):
            PretrainedDecoderConfig(pretrained=str(qwen)).build(Vocab(SIZES))
