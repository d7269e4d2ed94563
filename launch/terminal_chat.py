"""The dialogue in a terminal: questions in, answers out as they come, commands between."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.loaded_model import notices
from launch.options import read_options
from trainer.config import nearest
from trainer.errors import ConfigError, DataError, KuroshioError
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.dialogue import Dialogue

PROMPT, MORE = "> ", "… "
HELP = """/help              this list
/reset             forget the conversation
/retry             answer the last question again
/system [TEXT]     show the system prompt, or set it (- = none) and begin anew
/set [KEY=VALUE]   show the decoding keys, or set one
/history           the conversation so far
/save FILE         write the conversation as a line of JSON, a row for training
/exit              leave; so does Ctrl-D
A line that ends with \\ goes on in the next. Ctrl-C stops an answer."""


class _LeaveError(Exception):
    """Raised by /exit."""


class TerminalChat:
    """Talks until the input ends.

    Args:
        chat_model: answers.
        decoding: how, at first.
        overrides: the words that decided ``decoding``; /set adds to them.
        system: the system prompt.
    """

    def __init__(
        self, chat_model: ChatModel, decoding: Decoding, overrides: list[str], system: str | None
    ) -> None:
        self._chat_model, self._decoding = chat_model, decoding
        self._overrides = overrides
        self._dialogue = Dialogue(system)
        self._num_answers = 0  # of this conversation: a retry draws other numbers
        self._notices = notices()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/retry": self._retry,
            "/system": self._system,
            "/set": self._set,
            "/history": self._history,
            "/save": self._save,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Answer line after line; an error is shown and the talk goes on."""
        if sys.stdin.isatty():
            self._note("/help lists the commands")
        for line in read_lines():
            try:
                self._take(line)
            except _LeaveError:
                return
            except KuroshioError as error:
                self._note(str(error))
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self._note("stopped")

    def _take(self, line: str) -> None:
        """Obey a command or answer a question."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._answer(line)
        elif word in self._commands:
            self._commands[word](rest.strip())
        else:
            hint = nearest(word, self._commands)
            raise ConfigError(f"{word} is no command{hint or '; /help lists them'}")

    def _answer(self, question: str) -> None:
        dialogue, before = self._dialogue, self._dialogue.num_left_out
        prompt = dialogue.prompt(self._chat_model, question, self._decoding)
        if dialogue.num_left_out > before:
            self._note(
                f"the context of {self._chat_model.context_length} tokens is full: the model no "
                f"longer sees the oldest {dialogue.num_left_out} turns"
            )
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        name = f"answer {self._num_answers}"
        self._num_answers += 1
        try:
            answer = self._chat_model.answer([prompt], self._decoding, [name], show)[0]
            ending = "cut at the longest length" if answer.finish_reason == "length" else ""
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            ending = "stopped"
        print(flush=True)
        if ending:
            self._note(ending)
        dialogue.turns.append((question, "".join(pieces).rstrip()))

    def _help(self, rest: str) -> None:
        self._note(HELP)

    def _reset(self, rest: str) -> None:
        self._dialogue.reset()
        self._num_answers = 0
        self._note("a new conversation")

    def _retry(self, rest: str) -> None:
        if not self._dialogue.turns:
            raise ConfigError("/retry: there is no question yet")
        question, _ = self._dialogue.turns.pop()
        self._dialogue.num_left_out = min(self._dialogue.num_left_out, len(self._dialogue.turns))
        self._answer(question)

    def _system(self, rest: str) -> None:
        if rest:
            self._dialogue.system = None if rest == "-" else rest
            self._reset("")
        self._note(f"system prompt: {self._dialogue.system or 'none'}")

    def _set(self, rest: str) -> None:
        key = rest.partition("=")[0].strip()
        known = [field.name for field in dataclasses.fields(Decoding)]
        if rest and key not in known:
            raise ConfigError(f"{key} is no decoding key{nearest(key, known)}; /set shows all")
        if rest:
            overrides = [*self._overrides, rest]
            (self._decoding,) = read_options("chat", overrides, Decoding)
            self._overrides = overrides
        shown = dataclasses.asdict(self._decoding)
        self._note("  ".join(f"{k}={v}" for k, v in shown.items() if not rest or k == key))

    def _history(self, rest: str) -> None:
        for message in self._dialogue.messages():
            self._note(f"{message.role}: {message.content}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs the name of a file")
        path = Path(rest).expanduser()
        messages = [{"role": m.role, "content": m.content} for m in self._dialogue.messages()]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"/save {path}: {error.strerror}; choose another name") from error
        self._note(f"{len(self._dialogue.turns)} turns are in {path}")

    def _exit(self, rest: str) -> None:
        raise _LeaveError

    def _note(self, text: str) -> None:
        self._notices.print(text)


def read_lines() -> Iterator[str]:
    """Yield what is typed, or the lines of piped input, without empty ones, until the end."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (editing and history for input())
    parts: list[str] = []
    while True:
        try:
            line = input((MORE if parts else PROMPT) if interactive else "")
        except EOFError:
            if interactive:
                print()
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            parts = []
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        whole, parts = "\n".join([*parts, line]).strip(), []
        if whole:
            yield whole
    if parts:
        yield "\n".join(parts).strip()
