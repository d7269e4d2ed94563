"""Secrets never get into a config: refused by key or by value, and never printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ROOT
from launch.compose import compose_values
from launch.graph.definition import read_pipeline
from launch.rank_log import RankLog
from launch.secrets import (
    flatten,
    looks_secret,
    open_file_problems,
    open_secret_files,
    refuse_secrets,
)
from launch.tenancy import record_end
from trainer.errors import ConfigError
from trainer.lives import read_lives

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


@pytest.mark.parametrize(
    "word",
    [
        "name='${oc.env:DATABASE_PASSWORD}'",
        "name=x-correct-horse",
        "+data.sources.x.paths=[a,{b: correct-horse}]",
        "+data.sources.x.columns={correct-horse: text}",
        HF,
        f"{HF}=1",
    ],
)
def test_no_secret_of_the_environment_is_frozen(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that looks like nothing, however it comes in, and also as a key."""
    monkeypatch.setenv("DATABASE_PASSWORD", "correct-horse")
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        compose_values([word])
    assert "correct-horse" not in str(caught.value) and HF not in str(caught.value)


def test_nested_secrets_are_found() -> None:
    deep = {"a": [{"b": [["x", {"c": HF}]]}]}
    with pytest.raises(ConfigError, match=r"^a\[0\]\.b.*looks like a secret"):
        refuse_secrets(flatten(deep), environ={})


def test_a_pipeline_holds_no_secret_either(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("steps: {tok: {tokenizer: {paths: [a], vocab_size: 9}}, a: {run: [name=b]}}")
    for word in (f"tok.paths=[{HF}]", f"a.name={HF}", f"tok.api_key={WANDB}"):
        with pytest.raises(ConfigError, match="looks like a secret") as caught:
            read_pipeline([f"pipeline={file}", word])
        assert HF not in str(caught.value)
    file.write_text(f"steps: {{a: {{run: [name={HF}]}}}}")
    with pytest.raises(ConfigError, match=r"steps\.a\.run looks like a secret"):
        read_pipeline([f"pipeline={file}"])


PROGRAM = """
import logging, os, sys, warnings
from trainer.metrics.redaction import redact_output
redact_output(os.environ)
key = os.environ["WANDB_API_KEY"]
print("printed", key)
print("complained", key, file=sys.stderr)
logging.getLogger("x").warning("logged %s", key)
warnings.warn(f"warned {key}")
sys.stdout.write(f"https://me:{key}@host/ and {os.environ['OTHER_TOKEN']}\\n")
raise RuntimeError(f"raised {key}")
"""


def test_nothing_a_process_says_shows_a_secret() -> None:
    """Printed, logged, warned of or raised: what Slurm writes to a rank's log is this output."""
    environ = {**os.environ, "WANDB_API_KEY": WANDB, "OTHER_TOKEN": "correct-horse"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert WANDB not in said and "correct-horse" not in said
    for word in ("printed", "complained", "logged", "warned", "raised"):
        assert f"{word} [redacted]" in said, said
    assert "https://[redacted]@host/ and [redacted]" in done.stdout


def test_an_error_of_the_command_line_shows_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", f"--{HF}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 78 and "[redacted]: no such flag" in done.stderr
    assert HF not in done.stdout + done.stderr


def test_rank_logs_and_lives_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    (tmp_path / "config.yaml").touch()
    log = RankLog(tmp_path / "logs" / "rank_00000.log")
    log.add(f"a program said {WANDB} and ".encode() + b"\xff\n")
    assert log.path.read_bytes() == b"a program said [redacted] and \xff\n"
    (tmp_path / "leases").mkdir()
    record_end(tmp_path, None, {"SLURM_JOB_ID": "7"}, exit_code=1, reason=f"wandb refused {WANDB}")
    assert read_lives(tmp_path)[0]["reason"] == "wandb refused [redacted]"
    assert not [path for path in tmp_path.rglob("*.end") if WANDB in path.read_text()]


def test_files_with_keys_are_the_users_alone(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    netrc, token = tmp_path / ".netrc", tmp_path / ".cache/huggingface/token"
    token.parent.mkdir(parents=True)
    for path in (netrc, token):
        path.write_text("machine api.wandb.ai login user password x")
        path.chmod(0o600)
    assert open_file_problems(environ) == []
    token.chmod(0o604)
    netrc.chmod(0o640)
    assert open_secret_files(environ) == [netrc, token]
    (problem,) = open_file_problems(environ)
    assert f"chmod 600 {netrc} {token}, and renew" in problem
    with_key = {**environ, "WANDB_API_KEY": WANDB}  # then wandb reads no file
    assert open_file_problems(with_key) == []
    assert open_secret_files({**environ, "NETRC": "/none", "HF_HOME": "/none"}) == []


def test_frozen_files_hold_none(tmp_path: Path) -> None:
    """A config by file, or from another process, is read as critically as words are."""
    values = compose_values(["name=fine"]) | {"run_dir": str(tmp_path)}
    values["log"]["wandb_project"] = HF
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for verb in ("run", "submit"):
        done = subprocess.run(
            [sys.executable, "-m", "launch", verb, "--config", str(tmp_path / "config.yaml")],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 78 and "log.wandb_project looks like a secret" in done.stderr
        assert HF not in done.stderr
