"""``kuroshio serve`` as OpenAI's client meets it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_fixtures import COUNT, KNOWN, NAME, UNKNOWN, WHO

from launch.serve import TOKEN_VARIABLE, choose_token, listen, main
from trainer.errors import ConfigError
from trainer.inference.request_size import MAX_BODY_BYTES

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-the-tests-0123456789"
FAST = ["precision=fp32", "device=cpu", "temperature=0", "max_new_tokens=60"]


@pytest.fixture(scope="module")
def address(chat_folder: Path) -> Iterator[str]:
    """Return the base URL of a server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "serve", str(chat_folder), "port=0", *FAST],
        cwd=ROOT,
        env={**os.environ, TOKEN_VARIABLE: TOKEN},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        assert TOKEN not in line
        if found := re.match(r"(http://\S+/v1) serves 'poet'", line):
            yield found[1]
            break
    else:
        pytest.fail(f"the server ended with {process.wait()}")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stderr.close()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=TOKEN, max_retries=0, timeout=60)


def ask(client: openai.OpenAI, text: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="poet", messages=messages, **options)


def test_conversation_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client, WHO)
    assert answer.choices[0].message.content == UNKNOWN.strip()
    assert answer.choices[0].finish_reason == "stop" and answer.model == "poet"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": NAME}]},
        {"role": "assistant", "content": "你好，小明！"},
        {"role": "user", "content": WHO},
    ]
    whole = client.chat.completions.create(model="poet", messages=turns)
    assert whole.choices[0].message.content == KNOWN.strip()


def test_stream_comes_in_whole_characters(client: openai.OpenAI) -> None:
    chunks = list(ask(client, WHO, stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(pieces) == UNKNOWN.strip() and len(pieces) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_client_that_leaves_ends_its_answer(client: openai.OpenAI) -> None:
    with ask(client, WHO, stream=True, temperature=9, top_p=1, max_tokens=200) as stream:
        next(iter(stream))
    assert ask(client, WHO).choices[0].message.content == UNKNOWN.strip()


def test_request_sets_decoding(client: openai.OpenAI) -> None:
    cut = ask(client, "count", max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    stopped = ask(client, "count", stop=["three"])
    assert stopped.choices[0].message.content == "one two"
    streamed = list(ask(client, "count", stop="three", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed).strip() == "one two"
    wild = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 30}
    drawn = [ask(client, WHO, seed=n, **wild).choices[0].message.content for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = ask(client, WHO, seed=3, extra_body={"top_k": 1}, **wild)
    assert narrow.choices[0].message.content.startswith("我不知道")


def test_text_is_continued(client: openai.OpenAI) -> None:
    done = client.completions.create(model="poet", prompt="User: count\nAssistant:")
    assert done.choices[0].text == COUNT.strip()


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["poet"]
    with urllib.request.urlopen(address.removesuffix("/v1") + "/health") as response:
        assert response.status == 200


def test_nobody_enters_without_the_token(address: str) -> None:
    for key in ("wrong", TOKEN[:-1], f"{TOKEN}x"):
        stranger = openai.OpenAI(base_url=address, api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="not this server's token"):
            ask(stranger, WHO)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/docs"])
def test_other_routes_do_not_exist(client: openai.OpenAI, address: str, path: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post(address.removesuffix("/v1") + path, body={"model": "x"}, cast_to=object)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "expected a list"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "unknown role 'usr'"),
        ({"messages": [{"role": "user", "content": ""}]}, "is empty"),
        ({"messages": [{"role": "user", "content": "long " * 200}]}, "context of 256"),
        ({"temperature": -1}, "temperature=-1"),
        ({"extra_body": {"topp": 1}}, "topp is not a known field; did you mean top_p"),
        ({"n": 2}, "n=2 is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
        ({"max_tokens": "many"}, "max_new_tokens='many': expected int"),
    ],
)
def test_bad_request_is_told_why(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    messages = [{"role": "user", "content": WHO}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "poet", "messages": messages, **options})
    assert message in str(caught.value)


def test_another_model_is_not_here(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here, 'poet' is"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])


def test_port_in_use_is_an_error_before_loading(
    address: str, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    port = re.findall(r":(\d+)/", address)[0]
    with pytest.raises(ConfigError, match=f"port={port}: .*in use; choose another port"):
        main([str(chat_folder), f"port={port}"])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "login.cluster"])
def test_other_machines_are_kept_out_unless_allowed(host: str, chat_folder: Path) -> None:
    with pytest.raises(ConfigError, match="use an SSH tunnel"):
        main([str(chat_folder), f"host={host}"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, chat_folder: Path) -> None:
    monkeypatch.setattr("launch.serve.PACKAGES", ("fastapi", "uvicornn"))
    with pytest.raises(ConfigError, match=r"needs uvicornn;.*'\.\[serve\]'"):
        main([str(chat_folder)])


def test_token_is_made_once_in_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    path = tmp_path / "private" / "token"
    made, shown = choose_token(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(made) > 30
    assert made not in shown and str(path) in shown
    assert choose_token(str(path))[0] == made
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others: chmod 600"):
        choose_token(str(path))


def test_token_is_never_written_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="no terminal to show a new one"):
        choose_token(None)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        choose_token(None)


def test_a_free_port_is_taken() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="in use"):
        listen("127.0.0.1", listener.getsockname()[1])
    assert isinstance(listener, socket.socket)


def post(address: str, body: Iterator[bytes] | bytes, **headers: str) -> tuple[int, bytes]:
    """Send bytes to the server's first route; return its status and answer."""
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
    try:
        connection.request(
            "POST", f"{place.path}/chat/completions", body,
            {"Content-Type": "application/json", **headers},
        )  # fmt: skip
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (BrokenPipeError, ConnectionResetError):  # it stopped reading, and said so before
        return 0, b""
    finally:
        connection.close()


def test_requests_larger_than_any_conversation_are_refused(
    client: openai.OpenAI, address: str
) -> None:
    own, size = {"Authorization": f"Bearer {TOKEN}"}, MAX_BODY_BYTES + 1
    announced = {"Content-Length": str(size)}
    assert post(address, b"", **own, **announced)[0] == 413
    chunks = (b'{"x": "' if n == 0 else b"y" * (1 << 16) for n in range(size // (1 << 16) + 2))
    assert post(address, chunks, **own)[0] in (413, 0)
    assert post(address, b"", **announced)[0] == 401  # of a stranger's nothing is read
    assert ask(client, WHO).choices[0].message.content == UNKNOWN.strip()


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../docs"])
def test_no_path_leads_to_a_file(address: str, path: str) -> None:
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
    connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
    assert connection.getresponse().status == 404
    connection.close()


def test_tokens_are_compared_in_constant_time() -> None:
    source = (ROOT / "trainer/inference/serving.py").read_text(encoding="utf-8")
    assert "hmac.compare_digest(given" in source and '== f"Bearer' not in source
