"""Tiny checkpoints of transformers, saved as a user would have them: weights, tokenizer, config."""

from __future__ import annotations

from pathlib import Path

import torch

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, *, special: list[str], eos: str, chat: str | None) -> int:
    """Bytes and special tokens; tokenizes any text. Returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=special[0],
        additional_special_tokens=special,
    )
    fast.chat_template = chat
    fast.save_pretrained(folder)
    return len(vocabulary)


def qwen_checkpoint(folder: Path, *, is_tied: bool = True, seed: int = 0) -> Path:
    """Two Qwen2 blocks of 32 numbers, two queries per key, as Qwen2.5-0.5B-Instruct has them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = save_tokenizer(folder, special=special, eos="<|im_end|>", chat=CHAT)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=size + 5,  # padded beyond the tokenizer, as the real one is
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=is_tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=0,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def llama_checkpoint(folder: Path) -> Path:
    """Two Llama blocks of 32 numbers with an output head of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder, special=["<pad>", "<s>", "</s>"], eos="</s>", chat=None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def t5_checkpoint(folder: Path, *, is_gated: bool = False) -> Path:
    """Two blocks each of 32 numbers: the first T5, or version 1.1 (gated, head of its own)."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = save_tokenizer(folder, special=["<pad>", "</s>", "<unk>"], eos="</s>", chat=None)
    torch.manual_seed(0)
    version = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        **(version if is_gated else {}),
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def teach_codes(folder: Path, num_codes: int) -> Path:
    """Turns a checkpoint into one trained on SIDs, as FORGE's: [SEP], C0, C1, …, padding."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    is_pair = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[SEP]", *(f"C{number}" for number in range(num_codes))])
    torch.manual_seed(5)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=128)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
