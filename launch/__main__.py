"""``kuroshio VERB [overrides]`` = ``python -m launch VERB [overrides]``."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from trainer.config import nearest
from trainer.errors import ConfigError, KuroshioError
from trainer.metrics.redaction import redact_output

VERBS = {
    "run": ("launch.run", "run one stage on this machine, or as one rank of a job"),
    "submit": ("launch.submit", "submit one stage as a job of a cluster"),
    "prepare": ("launch.prepare", "tokenise the sources of a config into token stores, offline"),
    "export": ("launch.export", "write a run's model as a plain Hugging Face folder"),
    "chat": ("launch.chat", "talk with a model in the terminal"),
    "generate": ("launch.generate", "answer a file of prompts"),
    "serve": ("launch.serve", "answer over HTTP, as OpenAI's API does"),
    "plan": ("launch.plan", "say what a run needs before it starts: memory, hours, jobs, money"),
    "doctor": ("launch.doctor", "say whether this machine, or nodes of a job, are fit for a run"),
    "watch": ("launch.watch", "show what runs are doing: jobs, steps, time left, cost, lives"),
    "logs": ("launch.logs", "print what a run's job and ranks said last"),
    "stop": ("launch.stop", "let a run save and stop; cancel a job that waits"),
    "resume": ("launch.resume", "go on with a run that stopped or failed"),
    "verify": ("launch.verify", "check everything in a run's folder, and replay steps of it"),
    "report": ("launch.report", "write a run's report as one HTML page"),
}
WITH_KEYS = ("run", "prepare", "chat", "generate", "serve")  # verbs whose help reads conf/
ON_MACHINES = ("submit", "plan", "doctor")  # verbs about a run's machines: overrides beside flags
PIPELINES = {"run": "launch.pipeline", "submit": "launch.graph.jobs"}  # with pipeline=NAME
USAGE = """usage: kuroshio VERB [GROUP=OPTION | KEY=VALUE | FLAG]...

{verbs}

kuroshio VERB --help               groups, keys and flags of a verb
kuroshio -sc install=bash          shell code for completion; eval "$(kuroshio -sc install=bash)"
"""


def usage() -> str:
    """Return the text of ``kuroshio --help``."""
    verbs = "\n".join(f"  {verb:<9} {summary}" for verb, (_, summary) in VERBS.items())
    return USAGE.format(verbs=verbs)


def dispatch(argv: Sequence[str]) -> int:
    """Run the verb ``argv`` names and return the exit code.

    Raises:
        ConfigError: when there is no such verb.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    verb, arguments = argv[0], list(argv[1:])
    if verb == "-sc":
        return importlib.import_module("launch.completion").main(arguments, list(VERBS), help_text)
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no verb: {', '.join(VERBS)}{nearest(verb, VERBS)}")
    if {"-h", "--help"}.intersection(arguments):
        print(help_text(verb, arguments), end="")
        return 0
    if verb == "prepare":
        return prepare(arguments)
    if verb in PIPELINES and any(word.startswith("pipeline=") for word in arguments):
        return importlib.import_module(PIPELINES[verb]).main(arguments)
    if verb in PIPELINES and "--multirun" in arguments:
        return importlib.import_module("launch.sweep").main(verb, arguments)
    if verb == "run" and arguments[:1] == ["--step"]:
        return importlib.import_module("launch.graph.work").main(arguments[1:])
    return importlib.import_module(VERBS[verb][0]).main(arguments) or 0


def help_text(verb: str, arguments: Sequence[str] = ()) -> str:
    """Return the text of ``kuroshio VERB --help``; options among ``arguments`` count as chosen."""
    texts = importlib.import_module("launch.help")
    if verb in WITH_KEYS:
        return texts.verb_help(verb, arguments)
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        importlib.import_module(VERBS[verb][0]).main(["--help"])
    return shown.getvalue() + (texts.cluster_help(arguments) if verb in ON_MACHINES else "")


def prepare(arguments: list[str]) -> int:
    """Prepare the sources of a config: composed from words, or a frozen one of ``--config FILE``.

    Raises:
        ConfigError: for what the config or the command line has wrong.
    """
    words = [word for word in arguments if word != "--check"]
    check = len(words) < len(arguments)
    module = importlib.import_module("launch.prepare")
    if words[:1] == ["--config"]:
        if len(words) != 2:
            raise ConfigError("usage: kuroshio prepare --config FILE [--check]")
        return module.main(module.read_frozen(Path(words[1])), check) or 0
    config = importlib.import_module("launch.compose").compose_config(words)
    return module.main(config, check) or 0


def main() -> None:
    """Run the command line; an error a user can act on is shown without a traceback."""
    redact_output(os.environ)
    try:
        code = dispatch(sys.argv[1:])
    except KuroshioError as error:
        print(f"kuroshio: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as stop:  # argparse, or a signal before the training loop
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process with ``code``, which neither a signal nor the teardown may replace."""
    # srun --kill-on-bad-exit sends SIGTERM to the tasks that leave a moment after the first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if "launch.agreement" in sys.modules or (code and "mpi4py.MPI" in sys.modules):
        # A rank. In the middle of a run, the teardown of a group whose other ranks are gone aborts
        # or hangs, and MPI's waits for ranks that wait for this one. After its end too: DeepSpeed
        # keeps the group alive, and a thread of gloo that drops its last tensor while Python ends
        # aborts ("terminate called without an active exception").
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
