"""Secrets never get into a config: refused by key or by value, and never printed."""

from __future__ import annotations

import pytest

from launch.compose import compose_values
from launch.secrets import looks_secret
from trainer.errors import ConfigError

HF = "hf_" + "a1B2" * 8
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "key",
    ["wandb.api_key", "log.wandb_key", "hf_token", "auth.password", "client_secret", "x.apikey",
     "aws_secret_access_key", "credentials", "log.db_password_file"],
)  # fmt: skip
def test_secret_keys(key: str) -> None:
    assert looks_secret(key, "anything")


@pytest.mark.parametrize(
    "key",
    ["loop.max_tokens", "loop.eval_chars", "loop.global_batch_tokens", "tokenizer.path",
     "model.architecture.num_key_value_heads", "loop.keep_every", "stage.pad_token",
     "stage.base_tokenizer", "model.architecture.eos_token_id", "data.max_tokens_per_row"],
)  # fmt: skip
def test_harmless_keys(key: str) -> None:
    assert not looks_secret(key, "anything")


@pytest.mark.parametrize(
    "value",
    [HF, WANDB, "sk-" + "x" * 40, "AKIA" + "A" * 16, "ghp_" + "a" * 36, f"prefix {HF}",
     "https://me:pass@host/path", "-----BEGIN RSA PRIVATE KEY-----", f"'{WANDB}'"],
)  # fmt: skip
def test_secret_values(value: str) -> None:
    assert looks_secret("name", value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.revision", WANDB), ("name", "hf_model"), ("name", "sk-learn"), ("lr", 3e-4),
     ("model.path", f"/models/snapshots/{WANDB}"), ("name", "https://host/path")],
)  # fmt: skip
def test_harmless_values(key: str, value: object) -> None:
    assert not looks_secret(key, value)


@pytest.mark.parametrize(
    "override",
    [f"name={HF}", f"+wandb.api_key={WANDB}", f"name={WANDB}", f"name='{HF}", f"log={{a:{HF}}}",
     f"+data.sources.x.paths=[ok,{HF}]"],
)  # fmt: skip
def test_refused_naming_the_key_and_not_the_value(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_values([override])
    message = str(caught.value)
    assert override.partition("=")[0].lstrip("+") in message and "environment" in message
    assert HF not in message and WANDB not in message


def test_refused_when_it_comes_from_the_environment_through_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", HF)
    with pytest.raises(ConfigError) as caught:
        compose_values(["name='${oc.env:MY_KEY}'"])
    assert "name looks like a secret" in str(caught.value) and HF not in str(caught.value)
