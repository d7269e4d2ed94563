"""Chat templates: the tokenizer's own, the built-in ones, or a file.

A built-in template says in its first lines where its format is described, which tokens it needs,
and what it does with system messages and tools.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols

from trainer.config import nearest
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
        return _own_template(tokenizer)
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
            f'"stage.extra_pieces=[{pieces}]", or choose a template without special tokens '
            "(alpaca, vicuna, plain)"
        )
    try:
        syntax = Environment(extensions=[loopcontrols, "jinja2.ext.do"]).parse(text)
    except TemplateError as error:
        raise ConfigError(f"data.template={name} is not valid Jinja: {error}") from error
    if "eos_token" in meta.find_undeclared_variables(syntax) and tokenizer.eos_token is None:
        raise ConfigError(
            f"data.template={name} ends answers with eos_token, but the tokenizer names none; "
            "give a tokenizer with an end token, or a template that ends answers otherwise"
        )


def _is_one_token(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    ids = tokenizer.encode(token, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == token
