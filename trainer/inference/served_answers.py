"""Answers of ``ChatModel`` in the forms that transformers' server passes on to clients."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerationState,
    InferenceThread,
    _StreamError,
    response_events_to_chunks,
)

from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.text_stream import AnswerStream

LOG = logging.getLogger(__name__)


class CancelledError(Exception):
    """The client has gone."""


class Feed:
    """Carries text from the generator's thread into the event loop, until told to stop.

    Args:
        parser: of answers with calls or reasoning in them, which needs control tokens; or None.
    """

    def __init__(self, parser: Any) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.total_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()
        self._parser = parser
        for item in response_events_to_chunks(parser.initial_events) if parser else []:
            self.queue.put_nowait(item)

    @property
    def parses(self) -> bool:
        """Return whether control tokens are needed."""
        return self._parser is not None

    def put(self, text: str) -> None:
        """Pass a piece of text on.

        Raises:
            CancelledError: nobody wants it any more.
        """
        if self._cancelled.is_set():
            raise CancelledError
        items = response_events_to_chunks(self._parser.feed(text)) if self._parser else [text]
        for item in items:
            self.send(item)

    def end(self) -> None:
        """Say that nothing follows."""
        if self._parser:
            try:
                _, events = self._parser.finalize()
            except (ValueError, RuntimeError) as error:
                LOG.warning("an answer was cut within a call: %s", error)
                events = []
            for item in response_events_to_chunks(events):
                self.send(item)
        self.send(None)

    def cancel(self) -> None:
        """End the answer at its next piece of text."""
        self._cancelled.set()

    def send(self, item: Any) -> None:
        """Put an item of transformers' own kinds into the queue."""
        self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


class Wanted:
    """What a request wants, in the place of transformers' GenerationConfig.

    Handlers say ``length`` when the answer has ``max_new_tokens`` or more. It is set accordingly
    once the answer is there, since the context or an end token may have decided.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.max_new_tokens = decoding.max_new_tokens

    def settle(self, reason: str, num_tokens: int) -> None:
        """Make handlers say ``reason`` of an answer with ``num_tokens``."""
        self.max_new_tokens = num_tokens + (reason != "length")


class Generator(BaseGenerateManager):
    """Answers by ``ChatModel``, one request after another on a thread of its own."""

    def __init__(self, chat_model: ChatModel) -> None:
        self._chat_model = chat_model
        self._thread = InferenceThread()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Feed]:
        """Start an answer; return the queue that its pieces come by, and what can cancel it."""
        feed, prompt = Feed(response_parser), inputs["input_ids"][0].tolist()

        def run() -> None:
            try:
                self._answer(prompt, gen_config, feed)
                feed.end()
            except CancelledError:
                LOG.info("request %s: the client has gone", request_id)
            except Exception as error:  # it would die with this thread, and the client wait
                LOG.exception("request %s failed", request_id)
                feed.send(_StreamError(f"the answer failed: {type(error).__name__}"))

        self._thread.submit(run)
        return feed.queue, feed

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Return text, length of the prompt, and token ids of a whole answer."""
        prompt = inputs["input_ids"][0].tolist()
        stream = await self._thread.async_submit(self._answer, prompt, gen_config, None)
        token_ids = stream.token_ids
        # Answers with calls are parsed from their tokens, where a stop text is still in.
        while self._holds_any(gen_config.decoding.stop, token_ids):
            token_ids = token_ids[:-1]
        return stream.text.rstrip(), len(prompt), token_ids

    def _holds_any(self, texts: Sequence[str], token_ids: list[int]) -> bool:
        whole = self._chat_model.tokenizer.decode(token_ids) if texts else ""
        return any(text in whole for text in texts)

    def stop(self) -> None:
        """Do nothing: the thread ends with the process."""

    def _answer(self, prompt: list[int], wanted: Wanted, feed: Feed | None) -> AnswerStream:
        put = feed.put if feed else lambda text: None
        stream = self._chat_model.stream(
            prompt, wanted.decoding, put, show_special=feed is not None and feed.parses
        )
        self._chat_model.run([prompt], [stream], wanted.decoding, ["request"])
        wanted.settle(stream.finish_reason, len(stream.token_ids))
        if feed is not None:
            feed.total_tokens = len(stream.token_ids)
        return stream


class OneThread(GenerationState):
    """Gives every request the same generator."""

    def __init__(self, chat_model: ChatModel) -> None:
        super().__init__()
        self._generator = Generator(chat_model)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """Return the one generator."""
        return self._generator
