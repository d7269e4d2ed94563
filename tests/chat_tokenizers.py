"""Tokenizers that have every token a built-in chat template writes."""

from __future__ import annotations

import io

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenizer.spm import build_fast_tokenizer
from trainer.data.chats.templates import builtin_templates, needed_tokens, read_builtin

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is 1 + 1? It is 2.",
    "海流沿著臺灣東岸北上。請問今天天氣如何？今天是晴天，適合出門。",
    "def add(a, b):\n    return a + b\n\n# done\n",
]


def control_tokens() -> list[str]:
    """Return the tokens that the built-in templates write."""
    found = {token for name in builtin_templates() for token in needed_tokens(read_builtin(name))}
    return sorted(found)


def with_control_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add what the built-in templates write and the tokenizer lacks."""
    tokenizer.add_special_tokens({"additional_special_tokens": control_tokens()})
    return tokenizer


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE as Qwen's and Llama-3's are made; its pad is its end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return with_control_tokens(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
    )


def sentencepiece_bytes() -> bytes:
    """Train a small SentencePiece BPE as LLaMA's is made: byte fallback, texts left as they are."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of that model, with the tokens of all templates."""
    return with_control_tokens(build_fast_tokenizer(sentencepiece_bytes(), "the test's model"))
