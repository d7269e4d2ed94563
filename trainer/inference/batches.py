"""Which prompts are answered together."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.inference.answer_files import Key
from trainer.inference.chat_model import Answer, ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.prompts import Prompt


def plan_batches(
    prompts: Sequence[Prompt], num_samples: int, micro_batch_size: int
) -> list[list[Key]]:
    """Return all answers to be made, prompts of like length together, the longest first.

    So little is padding, memory runs out at once if it does, and the shares of ranks that take
    every n-th batch are alike. The batches depend on nothing that differs between two lives of a
    job: the same numbers come out to the last bit.
    """
    keys = [(prompt.index, sample) for prompt in prompts for sample in range(num_samples)]
    keys.sort(key=lambda key: (-len(prompts[key[0]].token_ids), key))
    return [keys[at : at + micro_batch_size] for at in range(0, len(keys), micro_batch_size)]


def answer_batch(
    chat_model: ChatModel, prompts: Sequence[Prompt], keys: Sequence[Key], decoding: Decoding
) -> dict[Key, Answer]:
    """Return the answers of one batch."""
    token_ids = [prompts[index].token_ids for index, _ in keys]
    names = [f"prompt {index} sample {sample}" for index, sample in keys]
    return dict(zip(keys, chat_model.answer(token_ids, decoding, names), strict=True))
