"""Chat templates: the tokenizer's own, the built-in ones, or a file.

A built-in template says in its first lines where its format is described, which tokens it needs,
and what it does with system messages and tools.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import nearest
from trainer.data.chats.rendering import MARK, Renderer
from trainer.data.reading.rows import RowError
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AUTO = "auto"
FOLDER = Path(__file__).with_name("templates")
INCLUDE = re.compile(r"^\{#- include (\w+) -#\}\n", re.MULTILINE)
NEEDED = re.compile(r"^tokens: (.+)$", re.MULTILINE)
# Tokens that a template file writes can be told by their look alone when it does not list them.
BARRED = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")


def builtin_templates() -> list[str]:
    """Return the names of the built-in templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def read_builtin(name: str) -> str:
    """Return the Jinja text of a built-in template."""
    shared = FOLDER / f"{name}.inc"
    path = shared if shared.exists() else FOLDER / f"{name}.jinja"
    # A chat template travels inside the tokenizer, so it must stand alone.
    return INCLUDE.sub(lambda match: read_builtin(match[1]), path.read_text(encoding="utf-8"))


def resolve_template(tokenizer: PreTrainedTokenizerFast, name: str = AUTO) -> str:
    """Return the Jinja text that ``data.template`` stands for, checked against the tokenizer.

    Args:
        tokenizer: a loaded tokenizer.
        name: ``auto`` for the tokenizer's own, a built-in name, or a ``.jinja`` file.

    Raises:
        ConfigError: no such template, no Jinja, or the tokenizer lacks tokens that it writes.
    """
    if name == AUTO:
        text = _own_template(tokenizer)
        _check_ending(tokenizer, name, text)
        return text
    path = Path(name).expanduser()
    if path.suffix in (".jinja", ".j2"):
        text = _read_file(path)
    elif name in builtin_templates():
        text = read_builtin(name)
    else:
        names = builtin_templates()
        raise ConfigError(
            f"data.template={name!r} is neither auto, a .jinja file nor one of "
            f"{', '.join(names)}{nearest(name, names)}"
        )
    _check_tokens(tokenizer, name, text)
    _check_ending(tokenizer, name, text)
    return text


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise ConfigError(
            "data.template=auto: the tokenizer has no chat_template, as of a base model; choose "
            f"the format to teach with data.template=NAME, one of {', '.join(builtin_templates())}"
            ", or data.template=FILE.jinja"
        )
    return str(own)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template={path} cannot be read: {error}") from error


def needed_tokens(text: str) -> list[str]:
    """Return the special tokens that a template writes."""
    listed = NEEDED.search(text)
    found = listed.group(1).split() if listed else BARRED.findall(text)
    return [token for token in dict.fromkeys(found) if token != "none"]


def _check_tokens(tokenizer: PreTrainedTokenizerFast, name: str, text: str) -> None:
    """Raise when a token that the template writes is not one token of the tokenizer."""
    lacking = [t for t in needed_tokens(text) if not _is_one_token(tokenizer, t)]
    if lacking:
        pieces = ",".join(f"'{token}'" for token in lacking)
        fitting = [
            other
            for other in builtin_templates()
            if all(_is_one_token(tokenizer, t) for t in needed_tokens(read_builtin(other)))
        ]
        raise ConfigError(
            f"data.template={name} writes {', '.join(lacking)}, which the tokenizer does not have "
            "as single tokens; add them and their embedding rows with stage=vocab "
            f'"stage.extra_pieces=[{pieces}]", or choose a template whose tokens it has: '
            f"{', '.join(fitting)}"
        )


def _check_ending(tokenizer: PreTrainedTokenizerFast, name: str, text: str) -> None:
    """Raise when the template is no Jinja, or nothing would teach a model where to end."""
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    renderer = Renderer(text, special | {"eos_token": MARK}, control)
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    try:
        rendered = renderer.render(chat, None)
    except RowError as error:
        raise ConfigError(f"data.template={name} cannot be used: {error}") from error
    closing = rendered.rpartition(".")[2]
    ends = MARK not in rendered and renderer.control_token.search(closing)
    if tokenizer.eos_token is None and not ends:
        raise ConfigError(
            f"data.template={name} needs an end token, but the tokenizer names none as eos_token; "
            "name one in tokenizer_config.json, or choose a template that ends answers by another"
        )


def _is_one_token(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    ids = tokenizer.encode(token, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == token
