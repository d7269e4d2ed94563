"""Where a run's figures go: ``metrics.jsonl`` always; console, wandb and TensorBoard beside it.

The only importer of wandb.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.config import LogConfig
from trainer.lease import Lease
from trainer.metrics.console import RunConsole, show_field
from trainer.metrics.journal import JOURNAL_NAME, Journal, rewind
from trainer.metrics.redaction import redact

logger = logging.getLogger(__name__)

PlotKind = Literal["histogram", "calibration"]
WANDB_INIT_TIMEOUT_S = 30  # how long an unreachable server may hold up a start


class OptionalSink(Protocol):
    """A sink whose failure does not concern the run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers under slash-separated names."""

    def text(self, step: int, name: str, text: str) -> None:
        """Record a text."""

    def close(self) -> None:
        """Finish writing."""


def wandb_run_id(run_dir: Path) -> str:
    """Return the run's id: the same folder continues the same wandb run."""
    return hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16]


class WandbSink:
    """Weights & Biases; falls back to offline when the server cannot be used."""

    def __init__(
        self, run_dir: Path, log: LogConfig, name: str, config: dict[str, Any], resumed: bool
    ) -> None:
        """Start or continue the run.

        Args:
            run_dir: the run's folder; wandb writes into its ``wandb/``.
            log: mode and project.
            name: shown name.
            config: plain data without secrets.
            resumed: False overwrites a run of the same folder that was started over.
        """
        import wandb  # 0.3 s that a run without it need not spend

        def init(mode: Literal["offline", "online"]) -> Any:
            return wandb.init(
                project=log.wandb_project,
                name=name,
                config=config,
                mode=mode,
                id=wandb_run_id(run_dir),
                resume="allow" if resumed and mode == "online" else None,
                dir=run_dir,
                settings=wandb.Settings(
                    console="off",  # leaves standard output to the run
                    silent=True,
                    init_timeout=WANDB_INIT_TIMEOUT_S,
                    login_timeout=WANDB_INIT_TIMEOUT_S,
                ),
            )

        try:
            self.run = init("online" if log.wandb == "online" else "offline")
        except wandb.errors.Error as error:
            if log.wandb != "online":
                raise
            first_line = str(error).partition("\n")[0]
            logger.warning(
                "log.wandb=online: %s; recording offline, send later with `wandb sync %s`",
                first_line,
                run_dir / "wandb" / "offline-run-*",
            )
            self.run = init("offline")
        # Our own step as the axis: wandb refuses to log a step again after a resume.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers."""
        self.run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as HTML."""
        import html

        import wandb

        self.run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class TensorBoardSink:
    """TensorBoard event files in ``RUN/tensorboard``."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Open a new event file that hides what a dead life wrote after ``resume_step``."""
        from torch.utils.tensorboard import SummaryWriter  # 1 s that only this sink costs

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text."""
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class Sinks:
    """Send every figure to all sinks, on the main rank; on the others do nothing."""

    def __init__(
        self,
        run_dir: Path,
        log: LogConfig,
        run_name: str,
        config: Mapping[str, Any],
        is_main: bool,
        resume_step: int = 0,
        lease: Lease | None = None,
    ) -> None:
        """Open the sinks; on a resume, cut the journal back to ``resume_step``.

        Args:
            run_dir: existing folder of the run.
            log: which optional sinks.
            run_name: shown name.
            config: the whole configuration as plain data, with ``loop.max_steps``.
            is_main: whether this rank writes (rank 0).
            resume_step: last step of the loaded checkpoint; 0 = from the start.
            lease: the right to write into the folder; None where nobody else can.

        Raises:
            StorageError: when ``metrics.jsonl`` cannot be written.
            LeaseError: a newer life owns the folder.
        """
        self.is_main = is_main
        if not is_main:
            return
        path = run_dir / JOURNAL_NAME
        if lease:
            lease.check()
        num_dropped, last_step = rewind(path, resume_step)
        self._journal = Journal(path, lease)
        self._console = RunConsole(run_name, config["loop"]["max_steps"], resume_step)
        self._optional: dict[str, OptionalSink] = {}
        if log.wandb != "off":
            secretless = redact(config)
            self._open(
                "wandb",
                lambda: WandbSink(run_dir, log, run_name, secretless, resume_step > 0),
            )
        if log.tensorboard:
            self._open("tensorboard", lambda: TensorBoardSink(run_dir, resume_step))
        if num_dropped:
            self.event(resume_step, "rewind", num_dropped=num_dropped, last_step=last_step)

    def rewind(self, step: int) -> None:
        """Cut the journal back to ``step``, from which the run goes on once more."""
        if self.is_main:
            path, lease = self._journal.path, self._journal.lease
            self._journal.close()
            num_dropped, last_step = rewind(path, step)
            self._journal = Journal(path, lease)
            self.event(step, "rewind", num_dropped=num_dropped, last_step=last_step)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one optimizer step: loss, lr, grad_norm, tokens, tokens_per_s, memory_gib, …"""
        if self.is_main:
            self._write("train", step, metrics)
            self._console.train(step, metrics)
            self._scalars(step, {f"train/{key}": value for key, value in metrics.items()})

    def evaluate(self, step: int, sources: Mapping[str, Mapping[str, float]]) -> None:
        """Record held-out figures by source: loss, perplexity, bits_per_character, …"""
        if self.is_main:
            self._write("eval", step, {"sources": {k: dict(v) for k, v in sources.items()}})
            self._console.evaluate(step, sources)
            self._scalars(
                step, {f"eval/{s}/{k}": v for s, items in sources.items() for k, v in items.items()}
            )

    def event(self, step: int, name: str, **fields: Any) -> None:
        """Record that something happened: save, resume, overflow, environment, mixture, …"""
        if self.is_main:
            self._write("event", step, {"event": name, **fields})
            shown = "  ".join(f"{key}={show_field(value)}" for key, value in fields.items())
            self._console.note(f"step {step}  {name}  {shown}".rstrip())

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record what the model wrote after ``prompt``."""
        if self.is_main:
            self._write("sample", step, {"prompt": prompt, "text": text})
            self._console.note(f"step {step}  sample  {prompt!r} → {text!r}")
            self._each(lambda sink: sink.text(step, "sample", f"{prompt}{text}"))

    def ranks(self, step: int, median_s: float, slowest: Sequence[Mapping[str, Any]]) -> None:
        """Record the ranks that took longest by themselves, and what the median rank took."""
        if self.is_main:
            self._write("ranks", step, {"median_s": median_s, "slowest": list(slowest)})

    def plot(self, step: int, kind: PlotKind, title: str, **data: Any) -> None:
        """Record what the report draws, of each title the last one (``draw_plots`` names data)."""
        if self.is_main:
            self._write("plot", step, {"kind": kind, "title": title, **data})

    def table(self, step: int, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table for the report, of each title the last one; rows have equal columns."""
        if self.is_main:
            self._write("table", step, {"title": title, "rows": [dict(row) for row in rows]})

    def close(self) -> None:
        """Close every sink."""
        if self.is_main:
            self._console.close()
            self._each(lambda sink: sink.close())
            self._optional.clear()
            self._journal.close()

    def _write(self, split: str, step: int, fields: Mapping[str, Any]) -> None:
        record = {"split": split, "step": step, "time": round(time.time(), 3), **fields}
        self._journal.write(record)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.scalars(step, values))

    def _open(self, name: str, build: Callable[[], OptionalSink]) -> None:
        """Add an optional sink, or warn that it is missing."""
        try:
            self._optional[name] = build()
        except Exception as error:
            self._warn(name, error)

    def _each(self, send: Callable[[OptionalSink], None]) -> None:
        """Send to every optional sink; one that fails is warned about once and left out."""
        for name, sink in list(self._optional.items()):
            try:
                send(sink)
            except Exception as error:
                del self._optional[name]
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        # Any exception: a dashboard's trouble must not end a training run.
        logger.warning("%s failed and is off from here on: %s (%s)", name, error, type(error))
