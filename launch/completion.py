"""Shell completion: verbs here, groups, options and keys through Hydra's plugins.

The shell code that Hydra prints calls ``kuroshio -sc query=SHELL`` with the typed line in
COMP_LINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from launch.help import FLAGS, read_keys, verb_files
from trainer.errors import ConfigError

COMPOSING = ("run", "submit", "prepare", "plan", "doctor")  # verbs whose words are overrides
TAKING_A_MODEL = ("chat", "generate", "serve")  # verbs with keys of their own


def main(arguments: Sequence[str], verbs: Sequence[str], help_text: Callable[[str], str]) -> int:
    """Print shell code for ``install=SHELL`` and ``uninstall=SHELL``, or words for ``query=SHELL``.

    Args:
        arguments: after ``-sc``.
        verbs: of the command line.
        help_text: returns the help of a verb, which names its flags.

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
        return _query(os.environ.get("COMP_LINE", ""), shell, verbs, help_text)
    from launch.compose import run_completion

    run_completion(f"{action}={shell}")
    return 0


def find_flags(verb: str, help_text: Callable[[str], str]) -> list[str]:
    """Return the flags that a verb's help lists, each at the start of a line."""
    text = FLAGS.get(verb) or help_text(verb)
    return re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]*)", text, re.MULTILINE)


def _query(line: str, shell: str, verbs: Sequence[str], help_text: Callable[[str], str]) -> int:
    """Print what may stand at the end of ``line``; nothing where the shell completes file names."""
    words = line.split()
    typing_verb = len(words) < 2 or (len(words) == 2 and not line[-1].isspace())
    if typing_verb:
        start = words[1] if len(words) == 2 else ""
        print("\n".join(verb for verb in verbs if verb.startswith(start)))
    elif words[1] in verbs and words[-1].startswith("-") and not line[-1].isspace():
        flags = find_flags(words[1], help_text)
        print("\n".join(flag for flag in flags if flag.startswith(words[-1])))
    elif words[1] in COMPOSING:
        from launch.compose import run_completion

        rest = line.split(maxsplit=2)[2] if len(words) > 2 else ""
        # What asks for a pipeline, or several runs, is no part of a run's own words.
        rest = re.sub(r"(pipeline=\S+|dir=\S+|--multirun)\s+", "", rest)
        os.environ["COMP_LINE"] = f"{words[0]} {rest}"
        run_completion(f"query={shell}")
    elif words[1] in TAKING_A_MODEL:
        start = "" if line[-1].isspace() else words[-1]
        keys = [f"{key}=" for path in verb_files(words[1]) for key in read_keys(path)]
        print("\n".join(key for key in dict.fromkeys(keys) if key.startswith(start)))
    return 0
