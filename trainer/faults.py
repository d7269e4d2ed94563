"""Where a test makes a rank fail: points that do nothing unless ``KUROSHIO_FAULT`` names them.

``KUROSHIO_FAULT="kill@step rank=1 step=4; stop@rollout rank=0"`` is read once per process. A fault
happens at the first point of its name whose facts are those given; ``once=FILE`` keeps it from
happening again in a later life (the file is made when it happens). Standard library only.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from trainer import errors
from trainer.errors import ConfigError

VARIABLE = "KUROSHIO_FAULT"
KINDS = ("kill", "stop", "hang", "slow", "raise", "poison")
ERRORS: dict[str, type[Exception]] = {"RuntimeError": RuntimeError} | {
    name: found for name, found in vars(errors).items() if isinstance(found, type)
}


@dataclass
class Fault:
    """One fault: what happens, at which point, to whom.

    Attributes:
        kind: ``kill`` (SIGKILL) and ``stop`` (SIGSTOP) of this process, ``hang`` (sleep for ever),
            ``slow`` (sleep for ``seconds``), ``raise`` an ``error``, ``poison``: the point
            returns True, and its caller spoils what it has.
        point: name of the point.
        facts: what the point must be called with.
        once: file that says that it has happened.
        seconds: of ``slow``.
        error: of ``raise``: a class of ``trainer/errors.py``, or a RuntimeError.
    """

    kind: str
    point: str
    facts: dict[str, str] = field(default_factory=dict)
    once: Path | None = None
    seconds: float = 1.0
    error: str = "RuntimeError"

    def strikes(self, point: str, facts: dict[str, object]) -> bool:
        """Return whether it happens here; claims ``once``."""
        if point != self.point or any(str(facts.get(k)) != v for k, v in self.facts.items()):
            return False
        if self.once is None:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def parse_faults(text: str) -> list[Fault]:
    """Return the faults of a ``KUROSHIO_FAULT``.

    Raises:
        ConfigError: it is not ``KIND@POINT [KEY=VALUE]…`` separated by semicolons.
    """
    faults = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        head, *words = part.split()
        kind, _, point = head.partition("@")
        facts = dict(word.partition("=")[::2] for word in words)
        seconds = facts.pop("seconds", "1")
        error = facts.pop("error", "RuntimeError")
        is_number = seconds.replace(".", "", 1).isdigit()
        is_whole = kind in KINDS and point and all(facts.values()) and is_number
        if not is_whole or error not in ERRORS:
            raise ConfigError(
                f"{VARIABLE}: {part!r} is not KIND@POINT KEY=VALUE…, with a kind of "
                f"{', '.join(KINDS)} and an error of trainer/errors.py; unset it unless you test "
                "what happens"
            )
        once = facts.pop("once", None)
        claim = Path(once) if once else None
        faults.append(Fault(kind, point, facts, claim, float(seconds), error))
    return faults


_FAULTS = parse_faults(os.environ.get(VARIABLE, ""))


def reach(point: str, **facts: object) -> bool:
    """Let a fault happen that was asked for here; return whether the caller is to spoil its data.

    Costs one comparison with an empty list when none was asked for.
    """
    if not _FAULTS:
        return False
    fault = next((fault for fault in _FAULTS if fault.strikes(point, facts)), None)
    if fault is None:
        return False
    if fault.kind == "poison":
        return True
    if fault.kind == "raise":
        raise ERRORS[fault.error](f"{VARIABLE}: {point} {facts}")
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return False
    if fault.kind == "hang":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
    return False
