"""Answers on disk while they are made, so that a killed job goes on where it was.

Each rank appends to a file of its own in a folder beside the output. What is there counts; a line
that a kill cut short does not. At the end the files become the output, in the order of the prompts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.storage import atomic_file, naming_the_disk, write_atomically
from trainer.errors import CheckpointError, ConfigError
from trainer.inference.chat_model import Answer
from trainer.inference.prompts import Prompt

SETTINGS_NAME = "settings.json"
Key = tuple[int, int]  # index of a prompt, number of its sample


class AnswerFiles:
    """The folder of unfinished answers.

    Args:
        output: the file that will hold all of them.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.parts")
        self._mended: set[Path] = set()

    def refuse_output(self) -> None:
        """Raise ConfigError if the output exists."""
        if self.output.exists():
            raise ConfigError(f"OUTPUT={self.output} exists; remove it or choose another name")

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Start, or go on with a job of the same ``settings``.

        Raises:
            ConfigError: the output exists, or the folder belongs to a job with other settings.
            StorageError: the folder cannot be written.
        """
        self.refuse_output()
        path = self.folder / SETTINGS_NAME
        if not path.is_file():
            write_atomically(path, json.dumps(settings, ensure_ascii=False).encode())
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(settings))
        lines = [
            f"  {key}: {begun.get(key)!r} there, {wanted.get(key)!r} now"
            for key in {**begun, **wanted}
            if begun.get(key) != wanted.get(key)
        ]
        if lines:
            raise ConfigError(
                f"{self.folder} holds answers of a job with other settings:\n"
                + "\n".join(lines)
                + "\ngo on with the old ones, remove that folder, or choose another OUTPUT"
            )

    def done(self) -> dict[Key, Answer]:
        """Return all answers that are there."""
        answers = {}
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            for record in _whole_lines(path):
                answers[record["index"], record["sample"]] = Answer(
                    record["text"], record["finish_reason"], record["num_tokens"]
                )
        return answers

    def append(self, rank: int, keys: Sequence[Key], answers: Sequence[Answer]) -> None:
        """Write answers of this rank; when this returns they survive a kill.

        Raises:
            StorageError: disk full or folder not writable.
        """
        path = self.folder / f"rank_{rank:05d}.jsonl"
        lines = [
            json.dumps({"index": index, "sample": sample, **vars(answer)}, ensure_ascii=False)
            for (index, sample), answer in zip(keys, answers, strict=True)
        ]
        with naming_the_disk(path), path.open("ab") as file:
            if path not in self._mended:
                file.truncate(_end_of_lines(path))  # what a kill cut short
                self._mended.add(path)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, prompts: Sequence[Prompt], num_samples: int) -> list[Answer]:
        """Turn the files into the output, in the order of the prompts; return the answers.

        Raises:
            CheckpointError: an answer is missing.
            StorageError: disk full or folder not writable.
        """
        done = self.done()
        keys = [(prompt.index, n) for prompt in prompts for n in range(num_samples)]
        if missing := [key for key in keys if key not in done]:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of {len(keys)} answers; start the same "
                "command again"
            )
        with atomic_file(self.output) as file:
            for index, sample in keys:
                record = _record(prompts[index], sample, done[index, sample])
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        shutil.rmtree(self.folder)
        return [done[key] for key in keys]


def _record(prompt: Prompt, sample: int, answer: Answer) -> dict[str, Any]:
    """Return a line of the output."""
    messages = prompt.conversation.as_chat()
    tools = prompt.conversation.tool_schemas()
    return {
        "file": prompt.file,
        "row": prompt.row,
        "sample": sample,
        "prompt": messages[-1]["content"],
        "answer": answer.text,
        "reference": prompt.reference,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
        "messages": messages,
        **({"tools": tools} if tools else {}),
    }


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _end_of_lines(path: Path) -> int:
    """Return the bytes of a file up to the end of its last whole line."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
