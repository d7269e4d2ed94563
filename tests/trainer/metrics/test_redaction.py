"""Secrets are found by key and by value, and ordinary keys are left alone."""

import pytest

from trainer.metrics.redaction import find_secrets, redact

FAKE_HUB_TOKEN = "hf_" + "a1B2" * 8  # assembled so that no scanner takes it for a real one


@pytest.mark.parametrize(
    "key",
    ["hf_token", "HF_TOKEN", "api_key", "wandb_api_key", "password", "access-token", "token",
     "client_secret", "private_key", "aws_credentials", "apikey"],
)  # fmt: skip
def test_secret_keys(key: str) -> None:
    assert redact({"a": {key: "x"}}) == {"a": {key: "[redacted]"}}


@pytest.mark.parametrize(
    "key",
    ["tokenizer", "global_batch_tokens", "eval_chars", "pad_token", "eos_token_id", "keep_every",
     "base_tokenizer", "tokens_per_s", "author", "key_bias", "secretary"],
)  # fmt: skip
def test_ordinary_keys(key: str) -> None:
    assert redact({key: "x"}) == {key: "x"}


@pytest.mark.parametrize(
    "value", [FAKE_HUB_TOKEN, "https://me:" + "pass@host/x", "ghp_" + "x" * 36, "sk-" + "y" * 40]
)
def test_secret_values(value: str) -> None:
    config = {"data": {"paths": ["a.txt", value]}, "lr": 1e-3}
    assert list(find_secrets(config)) == ["data.paths[1]"]
    assert redact(config) == {"data": {"paths": ["a.txt", "[redacted]"]}, "lr": 1e-3}
    assert config["data"]["paths"][1] == value  # type: ignore[index]  # the original is untouched


def test_empty_and_null_secrets_are_no_secrets() -> None:
    assert list(find_secrets({"hf_token": None, "password": "", "url": "https://host/path"})) == []
