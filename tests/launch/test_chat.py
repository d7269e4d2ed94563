"""``kuroshio chat`` as a user has it: a terminal, piped lines, wrong words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from chat_fixtures import COUNT, GREETING, KNOWN, NAME, UNKNOWN, WHO

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "launch", "chat"]
GREEDY = ["temperature=0", "precision=fp32", "device=cpu"]


def pipe(text: bytes, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *words],
        input=text,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environ},
        timeout=120,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.fixture
def terminal(shared_terminal: pexpect.spawn) -> pexpect.spawn:
    """Return the chat at the beginning of a conversation, its keys as it was started with."""
    for line in ("/set temperature=0", "/set max_new_tokens=60", "/system -"):
        say(shared_terminal, line)
    return shared_terminal


@pytest.fixture(scope="module")
def shared_terminal(chat_folder: Path) -> Iterator[pexpect.spawn]:
    """Return one chat in a pseudo-terminal, at its first question."""
    words = [str(chat_folder), *GREEDY, "max_new_tokens=60"]
    environ = {**os.environ, "TERM": "dumb"}
    child = pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], *words], cwd=ROOT, env=environ, encoding="utf-8", timeout=60
    )
    child.setwinsize(40, 200)
    child.expect("context 256 tokens")
    child.expect("\n> ")
    yield child
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def say(terminal: pexpect.spawn, line: str) -> str:
    """Type a line; return what came until the next prompt, without the echo."""
    terminal.sendline(line)
    terminal.expect_exact("\n> ")
    shown = terminal.before.replace("\r", "")
    return shown.partition("\n")[2].strip()


def test_turns_are_remembered_until_reset(terminal: pexpect.spawn) -> None:
    assert say(terminal, WHO) == UNKNOWN.strip()
    say(terminal, "/reset")
    assert say(terminal, NAME) == GREETING.strip()
    assert say(terminal, WHO) == KNOWN.strip()
    assert "a new conversation" in say(terminal, "/reset")
    assert say(terminal, WHO) == UNKNOWN.strip()


def test_set_changes_decoding_and_names_the_nearest_key(terminal: pexpect.spawn) -> None:
    assert "max_new_tokens=4" in say(terminal, "/set max_new_tokens=4")
    shown = say(terminal, "count")
    assert shown.startswith("one") and "cut at the longest length" in shown
    assert "did you mean max_new_tokens" in say(terminal, "/set max_new_token=9")
    assert "top_p=3.0: expected" in say(terminal, "/set top_p=3")
    assert "top_p=0.9" in say(terminal, "/set"), "a refused value is not kept"
    say(terminal, "/set max_new_tokens=60")
    assert say(terminal, "/retry") == COUNT.strip()


def test_system_prompt_changes_the_speaker(terminal: pexpect.spawn) -> None:
    assert "You are a poet." in say(terminal, "/system You are a poet.")
    assert say(terminal, WHO) == "我是詩人。"


def test_save_writes_a_row_for_training(terminal: pexpect.spawn, tmp_path: Path) -> None:
    say(terminal, "/system You are a poet.")
    say(terminal, WHO)
    path = tmp_path / "talk.jsonl"
    assert str(path) in say(terminal, f"/save {path}")
    (record,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
    assert record["messages"][2]["content"] == "我是詩人。"
    assert "choose another name" in say(terminal, f"/save {path}")
    assert "assistant: 我是詩人。" in say(terminal, "/history")


def interrupt(terminal: pexpect.spawn) -> bool | None:
    """Press Ctrl-C; return whether it stopped an answer, or came where one types; None: lost."""
    endings = ["stopped", "Ctrl-D leaves)"]
    terminal.sendintr()
    seen = terminal.expect_exact([*endings, pexpect.TIMEOUT], timeout=10)
    if seen == len(endings):  # as input() began to wait: Python looks for it at the next key
        terminal.sendline("")
        seen = terminal.expect_exact([*endings, pexpect.TIMEOUT], timeout=10)
    return {0: True, 1: False}.get(seen)


def interrupt_answer(terminal: pexpect.spawn) -> bool:
    """Interrupt an answer that has begun; return whether it was stopped before its end."""
    terminal.sendline("/reset")
    terminal.expect_exact("a new conversation")
    terminal.expect_exact("\n> ")
    terminal.sendline("noise")
    terminal.expect("noise\r\n.")
    was_stopped = interrupt(terminal) is True
    terminal.expect_exact("\n> ")
    return was_stopped


def test_interrupt_stops_the_answer_and_not_the_program(terminal: pexpect.spawn) -> None:
    say(terminal, "/set temperature=9")  # noise, which goes on to the end of the context
    say(terminal, "/set max_new_tokens=100000")
    # So small a model may end its answer before a busy machine lets the interrupt through, and
    # Python's input() drops one that comes while it flushes stdout and stderr: it is pressed again.
    assert any(interrupt_answer(terminal) for _ in range(20))
    assert interrupt(terminal) is False
    terminal.expect_exact("\n> ")
    say(terminal, "/reset")
    say(terminal, "/set temperature=0")
    assert say(terminal, WHO) == UNKNOWN.strip()


def test_full_context_drops_the_oldest_turns(terminal: pexpect.spawn) -> None:
    say(terminal, "/set max_new_tokens=20")
    notice = "the oldest"
    shown = [say(terminal, f"{NAME} and {WHO} {n}") for n in range(8)]
    assert notice not in "".join(shown[:2]) and notice in "".join(shown)
    assert "context" in say(terminal, "long " * 100), "a question that cannot fit is refused"
    assert say(terminal, "/help").startswith("/help")


def test_unknown_command_names_the_nearest(terminal: pexpect.spawn) -> None:
    assert "did you mean /reset" in say(terminal, "/rest")


def test_piped_lines_are_questions_and_stdout_has_only_answers(
    chat_folder: Path, tmp_path: Path
) -> None:
    persona = tmp_path / "poet.txt"
    persona.write_bytes(b"\xef\xbb\xbfYou are a poet.\n")
    text = f"{WHO}\n/system -\n{NAME}\n\n{WHO}\n/nonsense\n".encode() + b"broken \xff\n"
    done = pipe(text, str(chat_folder), *GREEDY, f"persona={persona}", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    answers = ["我是詩人。", GREETING.strip(), KNOWN.strip()]
    assert done.stdout.splitlines()[:3] == answers
    assert "/nonsense is no command" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL is missing"),
        (["temperature=0"], "MODEL is missing before temperature=0"),
        (["FOLDER", "hello"], "'hello' is not KEY=VALUE"),
        (["FOLDER", "temprature=0"], "temprature is not a known key; did you mean temperature"),
        (["FOLDER", "top_p=0", "seed=x"], "seed='x': expected int"),
        (["FOLDER", "num_beams=2"], "set temperature=0, or num_beams=1"),
        (["FOLDER", "system=a", "persona=b"], "give one of them"),
        (["FOLDER", "persona=/nowhere"], "persona=/nowhere cannot be read"),
        (["/nowhere/model"], "there is no such folder"),
        (["FOLDER", "device=cuda:99"], "device=cuda:99"),
        (["FOLDER", "base=/nowhere"], "is a whole model folder"),
        (["FOLDER", "template=chatlm"], "template='chatlm'"),
    ],
)
def test_wrong_words_are_one_message(chat_folder: Path, words: list[str], message: str) -> None:
    """In this process: a dozen starts would take a minute."""
    from launch.chat import main
    from trainer.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        main([str(chat_folder) if word == "FOLDER" else word for word in words])
    assert message in str(caught.value)
