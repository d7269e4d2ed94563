"""``kuroshio serve MODEL``: an OpenAI-compatible HTTP server on this machine, behind a token."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import secrets
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.options import read_options, split_words
from trainer.errors import ConfigError

PACKAGES = ("fastapi", "uvicorn", "openai")
TOKEN_VARIABLE = "KUROSHIO_SERVE_TOKEN"
MIN_TOKEN_CHARS = 16
GRACE_S = 5  # for answers under way when the server is stopped


@dataclass(frozen=True)
class Serving:
    """Where the server listens, and who may come in.

    Attributes:
        host: address to listen on.
        port: 0 = a free one.
        name: by which clients ask for the model; None = the folder's.
        token_file: file with the token.
        allow_remote: whether other machines may reach ``host``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    token_file: str | None = None
    allow_remote: bool = False

    def problems(self) -> list[str]:
        """Return values that make no sense or would let others in."""
        problems = []
        if not 0 <= self.port < 65536:
            problems.append(f"port={self.port}: expected 0 (a free one) to 65535")
        if not is_loopback(self.host) and not self.allow_remote:
            problems.append(
                f"host={self.host} would let other machines send requests, and the token, over "
                f"unencrypted HTTP; use an SSH tunnel (ssh -L {self.port}:127.0.0.1:{self.port} "
                "THIS_MACHINE) or, behind a firewall or proxy, allow_remote=true"
            )
        return problems


def main(arguments: Sequence[str]) -> int:
    """Load the model and serve it until a signal; return the exit code.

    Raises:
        ConfigError: a word, a key or the model is wrong, the port is in use, packages are missing.
        CheckpointError: a run without a complete checkpoint.
    """
    (folder,), overrides = split_words("serve", arguments, ["MODEL"])
    refuse_missing_packages()
    from trainer.inference.decoding import Decoding
    from trainer.inference.loading import Loading

    classes = (Serving, Loading, Decoding)
    serving, loading, decoding = read_options("serve", overrides, *classes)
    token, shown = choose_token(serving.token_file)
    with listen(serving.host, serving.port) as listener:
        from launch.loaded_model import load, notices

        chat_model = load(folder, loading)
        chat_model.name = serving.name or chat_model.name
        import uvicorn

        from trainer.inference.serving import build_app

        app = build_app(chat_model, decoding, token)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        notices().print(f"http://{address}:{port}/v1 serves {chat_model.name!r}; {shown}")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S)
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            notices().print("stopped")
    return 0


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_missing_packages() -> None:
    """Raise ConfigError when a package that only this verb needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kuroshio serve needs {', '.join(missing)}; in the checkout: {sys.executable} -m pip "
            "install --constraint constraints.txt --editable '.[serve]' (make install does so)"
        )


def choose_token(file: str | None) -> tuple[str, str]:
    """Return the token, and what to tell the user of it.

    It comes from the environment, else from ``file``, else it is made: into ``file``, or shown on
    the terminal. Never into a log, which others may read.

    Raises:
        ConfigError: it is too short, others can read it, or there is nowhere to put it.
    """
    if given := os.environ.get(TOKEN_VARIABLE, "").strip():
        return _checked(given, TOKEN_VARIABLE), f"the token is that of {TOKEN_VARIABLE}"
    made = secrets.token_urlsafe(32)
    if file is not None:
        path = Path(file).expanduser()
        try:
            _write_private(path, made)
        except FileExistsError:
            return _read_private(path), f"the token is in {path}"
        except OSError as error:
            raise ConfigError(f"token_file={file} cannot be written: {error}") from error
        return made, f"the token is in {path}"
    if not sys.stderr.isatty():
        raise ConfigError(
            "there is no token, and no terminal to show a new one on; set token_file=FILE or "
            f"{TOKEN_VARIABLE}"
        )
    return made, f"token: {made}"


def _checked(token: str, where: str) -> str:
    if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"the token in {where} has {len(token)} characters; give {MIN_TOKEN_CHARS} or more "
            "ASCII characters, for instance those of `openssl rand -hex 32`"
        )
    return token


def _write_private(path: Path, token: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")


def _read_private(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={path} cannot be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"token_file={path} can be read by others: chmod 600 {path}")
    return _checked(token, str(path))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address, before the model is loaded in vain.

    Clients that come early wait.

    Raises:
        ConfigError: the address is in use or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise ConfigError(
            f"host={host} port={port}: {reason}; choose another port, or port=0 for a free one"
        ) from error
