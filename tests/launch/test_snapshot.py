"""The copy of the code that runs take along holds nobody's keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.snapshot import PARTS, copy_code
from trainer.errors import ConfigError

HF = "hf_" + "a1B2" * 8
WANDB = "0123456789abcdef0123456789abcdef01234567"
KEY_FILES = (
    ".env", ".netrc", "_netrc", "site.env", "server.pem", "tls.key", "id_rsa", "id_rsa.pub",
    "id_ed25519", "credentials.json", ".git-credentials", "secrets.yaml", ".ssh/id_ecdsa",
    ".config/token", "store.p12",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for part in PARTS:
        (root / part / "inner").mkdir(parents=True)
        (root / part / "inner" / "code.py").write_text("x = 1\n")
    return root


def write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_files_with_keys_are_left_out(checkout: Path, tmp_path: Path) -> None:
    for part in PARTS:
        for name in KEY_FILES:
            key = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{HF}\n"
            write_file(checkout / part / "inner" / name, key)
    copy_code(tmp_path / "copy", checkout)
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*.*")}
    assert copied == {"__main__.py", *(f"{part}/inner/code.py" for part in PARTS)}
    text = "".join(p.read_text() for p in (tmp_path / "copy").rglob("*") if p.is_file())
    assert HF not in text and "PRIVATE KEY" not in text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("launch/login.py", f'token = "{HF}"'),
        ("slurm/env/site.sh", f"export WANDB_API_KEY={WANDB}"),
        ("slurm/env/site.sh", "  DB_PASSWORD='short'"),
        ("conf/log/mine.yaml", f"wandb_key: {WANDB}"),
        ("conf/data/mine.yaml", "url: https://me:pass@host/data"),
        ("trainer/key.py", 'KEY = "-----BEGIN RSA PRIVATE KEY-----'),
    ],
    ids=["python", "shell", "short", "yaml", "url", "key"],
)
def test_a_secret_in_a_file_is_refused_by_its_line(
    checkout: Path, tmp_path: Path, name: str, line: str
) -> None:
    write_file(checkout / name, f"# first\n{line}\n")
    with pytest.raises(ConfigError, match=rf"{name}, line 2: looks like a secret") as refused:
        copy_code(tmp_path / "copy", checkout)
    assert not any(secret in str(refused.value) for secret in (HF, WANDB, "short", "pass@"))
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("slurm/env/site.sh", 'export WANDB_API_KEY="$MY_KEY" HF_TOKEN='),
        ("slurm/env/site.sh", "export HF_TOKEN_PATH=/work/me/token"),
        ("conf/data/mine.yaml", "pad_token: <pad>"),
        ("conf/stage/mine.yaml", "hf_token: null"),
        ("trainer/code.py", "api_key = read_key()"),
    ],
)
def test_what_only_names_a_secret_is_copied(
    checkout: Path, tmp_path: Path, name: str, line: str
) -> None:
    write_file(checkout / name, f"{line}\n")
    copy_code(tmp_path / "copy", checkout)
    assert (tmp_path / "copy" / name).read_text() == f"{line}\n"


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_out_of_the_checkout_are_refused(
    checkout: Path, tmp_path: Path, is_folder: bool
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes").write_text("mine")
    target = tmp_path / "home" if is_folder else tmp_path / "home" / "notes"
    (checkout / "conf" / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=r"is a link to .*home/notes: put the file itself there"):
        copy_code(tmp_path / "copy", checkout)
