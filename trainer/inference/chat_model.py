"""A model that answers: prompts in batches, one answer each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

from tokenizer.load import num_ids
from trainer.data.chats.chat import prompt_ids, stop_token_ids
from trainer.data.chats.conversation import Message
from trainer.inference.decoding import Decoding
from trainer.inference.sampling import sampling_processors
from trainer.inference.text_stream import AnswerStream
from trainer.models.context import context_length


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without the token or text that ended it, and without white space around it.
        finish_reason: ``stop``, or ``length`` when max_new_tokens or the context ended it.
        num_tokens: tokens computed for it, an end token among them.
    """

    text: str
    finish_reason: str
    num_tokens: int


class ChatModel:
    """A causal language model with its tokenizer, whose chat template is set.

    Args:
        model: on its device, in its precision.
        tokenizer: the model's own.
        name: to show.
        identity: of the weights, equal for equal ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        name: str,
        identity: str,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name, self.identity = name, identity
        self.context_length = context_length(model.config)
        self.stop_ids = stop_token_ids(tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        # Rows that pad the matrix to a round size are no tokens.
        self.padding_ids = list(range(num_ids(tokenizer), rows))
        # What a folder's generation_config.json says would fill in for what we leave unset.
        model.generation_config = GenerationConfig()

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.model.device

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the token ids of a prompt, as the chat template writes it.

        Raises:
            RowError: the template refuses these messages.
        """
        return prompt_ids(self.tokenizer, messages, tools)

    def room_after(self, num_prompt_tokens: int, decoding: Decoding) -> int:
        """Return how many tokens an answer may have; 0 or less: the prompt fills the context."""
        if self.context_length is None:
            return decoding.max_new_tokens
        return min(decoding.max_new_tokens, self.context_length - num_prompt_tokens)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        names: Sequence[str],
        on_text: Callable[[str], None] = lambda text: None,
    ) -> list[Answer]:
        """Answer several prompts at once, each as if it were alone.

        Args:
            prompts: token ids of each, shorter than the context.
            decoding: the parameters.
            names: one per prompt; with the seed they decide its random numbers.
            on_text: called with each piece of text as it comes; for a single prompt. With beams,
                once the answer is whole.

        Returns:
            The answers, in the order of the prompts.
        """
        streams = [self.stream(prompt, decoding, on_text) for prompt in prompts]
        self.run(prompts, streams, decoding, names)
        return [Answer(s.text.rstrip(), s.finish_reason, len(s.token_ids)) for s in streams]

    def stream(
        self,
        prompt: Sequence[int],
        decoding: Decoding,
        on_text: Callable[[str], None] = lambda text: None,
        show_special: bool = False,
    ) -> AnswerStream:
        """Return what will follow the answer to ``prompt``."""
        room = self.room_after(len(prompt), decoding)
        stop_ids, stop = self.stop_ids, decoding.stop
        return AnswerStream(self.tokenizer, stop_ids, stop, room, on_text, show_special)

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[AnswerStream],
        decoding: Decoding,
        names: Sequence[str],
    ) -> None:
        """Generate until every stream has ended; see ``answer``."""
        input_ids, attention_mask = pad_left(prompts)
        length = input_ids.shape[1]
        greedy = decoding.num_beams == 1
        processors = sampling_processors(decoding, names)
        if decoding.repetition_penalty != 1:
            processors.insert(0, RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        longest = max(self.room_after(len(prompt), decoding) for prompt in prompts)
        sequences = self.model.generate(
            input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            generation_config=self._generation_config(decoding, longest),
            logits_processor=processors,
            stopping_criteria=[Follow(streams)] if greedy else [EndOfBeams(self, decoding, length)],
        )
        if not greedy:
            for stream, token_ids in zip(streams, sequences[:, length:].tolist(), strict=True):
                any(stream.feed(token_id) for token_id in token_ids)
        for stream in streams:
            if not stream.finish_reason:  # the best beam may be shorter than the longest answer
                stream.end("length")

    def _generation_config(self, decoding: Decoding, max_new_tokens: int) -> GenerationConfig:
        """Return a greedy or beam search; sampling is the processors' part."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=False,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
            suppress_tokens=self.padding_ids or None,
        )


class Follow(StoppingCriteria):
    """Feeds each row's new token to its stream and ends the rows whose stream ended."""

    def __init__(self, streams: Sequence[AnswerStream]) -> None:
        self._streams = streams

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows of input_ids [rows, seq] have ended, as bool [rows]."""
        newest = input_ids[:, -1].tolist()
        ended = [s.feed(token_id) for s, token_id in zip(self._streams, newest, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class EndOfBeams(StoppingCriteria):
    """Ends beams that hold a stop text; they change places, so that each is read anew."""

    def __init__(self, chat_model: ChatModel, decoding: Decoding, num_prompt_tokens: int) -> None:
        self._decode = chat_model.tokenizer.batch_decode
        self._stop, self._start = decoding.stop, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which beams of input_ids [beams, seq] have ended, as bool [beams]."""
        if not self._stop:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = self._decode(input_ids[:, self._start :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, both int64 [rows, longest].

    A row is filled up with its own first token: a pad token would count as one that occurred, and
    the repetition penalty would fall on it.
    """
    longest = max(map(len, prompts))
    rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(masks)
