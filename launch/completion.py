"""Shell completion: verbs here, groups, options and keys through Hydra's plugins.

The shell code that Hydra prints calls ``kuroshio -sc query=SHELL`` with the typed line in
COMP_LINE.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from launch.help import read_keys, verb_files
from trainer.errors import ConfigError

COMPOSING = ("run", "prepare")  # verbs whose words are overrides
TAKING_A_MODEL = ("chat", "generate", "serve")  # verbs with keys of their own


def main(arguments: Sequence[str], verbs: Sequence[str]) -> int:
    """Print shell code for ``install=SHELL`` and ``uninstall=SHELL``, or words for ``query=SHELL``.

    Raises:
        ConfigError: for another action or an unknown shell.
    """
    action, _, shell = arguments[0].partition("=") if arguments else ("", "", "")
    if action not in ("install", "uninstall", "query") or not shell or len(arguments) > 1:
        raise ConfigError(
            f"-sc {' '.join(arguments)}: expected install=SHELL, uninstall=SHELL or query=SHELL "
            "with SHELL bash, zsh or fish"
        )
    if action == "query":
        return _query(os.environ.get("COMP_LINE", ""), shell, verbs)
    from launch.compose import run_completion

    run_completion(f"{action}={shell}")
    return 0


def _query(line: str, shell: str, verbs: Sequence[str]) -> int:
    """Print what may stand at the end of ``line``."""
    words = line.split()
    typing_verb = len(words) < 2 or (len(words) == 2 and not line[-1].isspace())
    if typing_verb:
        start = words[1] if len(words) == 2 else ""
        print("\n".join(verb for verb in verbs if verb.startswith(start)))
    elif words[1] in COMPOSING:
        from launch.compose import run_completion

        rest = line.split(maxsplit=2)[2] if len(words) > 2 else ""
        os.environ["COMP_LINE"] = f"{words[0]} {rest}"
        run_completion(f"query={shell}")
    elif words[1] in TAKING_A_MODEL:
        start = "" if line[-1].isspace() else words[-1]
        keys = [f"{key}=" for path in verb_files(words[1]) for key in read_keys(path)]
        print("\n".join(key for key in dict.fromkeys(keys) if key.startswith(start)))
    return 0
