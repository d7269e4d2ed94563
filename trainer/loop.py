"""The only training loop: resume, step, log, evaluate, save, roll back, until the end or a stop."""

from __future__ import annotations

import logging
import time
from contextlib import closing

from trainer import heartbeat
from trainer.config import LoopConfig
from trainer.deadline import Deadline, name_ranks
from trainer.engine import checkpoint
from trainer.engine.collectives import gather_figures, gather_texts, sum_over_ranks, sum_tensor
from trainer.engine.committed import Checkpoint, describe_layout, find_newest
from trainer.engine.replicas import compare_replicas
from trainer.engine.saver import Saved, Saver
from trainer.environment import name_device
from trainer.errors import RollBackError
from trainer.lives import STOP_NAME
from trainer.metrics.sinks import Sinks
from trainer.roll_back import record_roll_back, redirect
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.train_stage import TrainStage

LOG = logging.getLogger(__name__)


def fit(stage: TrainStage, context: Context) -> None:
    """Resume, step until ``max_steps`` or a stop that all ranks agree on, log, evaluate, save."""
    loop, folder = context.config.loop, context.run_dir / "checkpoints"
    with stop_request(context).listening() as stop:
        last = redirect(find_newest(folder, loop.damaged), context.run_dir, context.rank)
        step = last.step if last else 0
        if step >= loop.max_steps and is_evaluated(last):
            LOG.warning("%s is finished at step %d: nothing to do", context.run_dir, step)
            return
        with (
            closing(stage.setup(context, step)) as sinks,
            make_saver(stage, context, sinks, stop) as saver,
        ):
            while True:
                try:
                    return train(stage, context, sinks, stop, saver, last)
                except RollBackError as error:
                    with heartbeat.phase("save"):
                        saver.wait()
                    last = roll_back(stage, context, sinks, error)


def train(
    stage: TrainStage,
    context: Context,
    sinks: Sinks,
    stop: StopRequest,
    saver: Saver,
    last: Checkpoint | None,
) -> None:
    """Go on from a checkpoint, or the start, to the end, a saved stop or what ``fit`` undoes."""
    loop, guard = context.config.loop, context.config.guard
    step, evaluated = (last.step if last else 0), is_evaluated(last)
    batches = stage.batches(last.state if last else None)
    if last:
        resume(stage, context, last, stop, sinks)
    is_saved = bool(last) and evaluated
    heartbeat.beat(heartbeat.BETWEEN, step)
    evaluated = evaluated or evaluate_if_due(stage, sinks, step, stop, loop)
    while step < loop.max_steps and not stop.agreed("step"):
        with stop.deadline.timed("step"), heartbeat.phase("step", step):
            stage.meters.step(stage.train_step(step, batches))
            step += 1
            for event in stage.guard.take_events():
                sinks.event(step, "skip", **event)
            if is_due(step, loop.log_every, loop):
                log(stage, sinks, step)
        if guard.compare_every and step % guard.compare_every == 0:
            compare_replicas(stage.policy, step)
        evaluated = evaluate_if_due(stage, sinks, step, stop, loop)
        is_saved = is_due(step, loop.save_every, loop)
        if is_saved:
            save(stage, context, saver, step, evaluated, stop)
        saver.poll()
    if not is_saved:
        save(stage, context, saver, step, evaluated, stop)
    with heartbeat.phase("save", step):
        saver.wait()  # before anybody is told that the run has ended well
    heartbeat.beat("leave", step)
    if step < loop.max_steps or not evaluated:
        raise stop.honoured(step)


def stop_request(context: Context) -> StopRequest:
    """Return what may end this rank early; the stop file and the time limit are rank 0's to see."""
    if context.rank != 0:
        return StopRequest()
    return StopRequest(context.run_dir / STOP_NAME, Deadline(context.time_limit))


def is_evaluated(last: Checkpoint | None) -> bool:
    """Return whether nothing is left to evaluate at a checkpoint's step."""
    return bool(last and last.step and last.state["evaluated"])


def roll_back(
    stage: TrainStage, context: Context, sinks: Sinks, error: RollBackError
) -> Checkpoint | None:
    """Go back to the newest checkpoint, redirected to data behind the step that failed."""
    config, where = context.config, (context.run_dir, context.rank)
    last = redirect(find_newest(context.run_dir / "checkpoints", config.loop.damaged), *where)
    num_rows = stage.rows_per_step(config)
    made = record_roll_back(error, last, *where, num_rows, config.guard.max_roll_backs)
    stage.bag.forget()
    sinks.rewind(made.to_step)
    sinks.event(made.to_step, "roll_back", **made.describe())
    return redirect(last, *where)


def resume(
    stage: TrainStage, context: Context, last: Checkpoint, stop: StopRequest, sinks: Sinks
) -> None:
    """Load a checkpoint into the stage that has been set up; record what that took."""
    start = time.monotonic()
    with stage.meters.pause(), heartbeat.phase("load", last.step):
        num_bytes = checkpoint.load(stage.policy, last)
        [sum_bytes] = sum_over_ranks([num_bytes])  # waits for the slowest, whose time counts
    stage.guard.load(last.state.get("guard", {}), last.state["num_overflows"])
    seconds = last.state.get("seconds", {})
    stop.deadline.expect(seconds.get(describe_ranks(stage, context), {}))
    sinks.event(
        last.step,
        "resume",
        checkpoint=last.path.name,
        of=last.layout,
        on=describe_layout(context.world_size, context.config.engine.zero_stage),
        gb_read=round(sum_bytes / 1e9, 3),
        seconds=round(time.monotonic() - start, 3),
        life=context.lease.token if context.lease else None,
    )


def evaluate_if_due(
    stage: TrainStage, sinks: Sinks, step: int, stop: StopRequest, loop: LoopConfig
) -> bool:
    """Return whether nothing is left to evaluate at ``step``; it is redone after a stop."""
    if not loop.eval_chars or (step and not is_due(step, loop.eval_every, loop)):
        return True
    if stop.agreed("evaluation"):
        return False
    with stop.deadline.timed("evaluation"), heartbeat.phase("evaluation", step):
        return stage.evaluate(sinks, step, stop)


def describe_ranks(stage: TrainStage, context: Context) -> str:
    """Return on what the run computes: how long things take there says nothing of elsewhere."""
    return name_ranks(context.world_size, name_device(stage.policy.device))


def make_saver(stage: TrainStage, context: Context, sinks: Sinks, stop: StopRequest) -> Saver:
    """Return what saves the stage; what a thread of it cannot do ends the run at the next step."""

    def report(saved: Saved) -> None:
        stop.deadline.end_save(saved.seconds)
        times = {"stall_s": round(saved.stall_s, 3), "seconds": round(saved.seconds, 3)}
        sinks.event(saved.step, "save", checkpoint=saved.path.name, **times)

    return Saver(
        stage.policy,
        context.run_dir / "checkpoints",
        context.config.loop,
        context.lease,
        on_failure=lambda: stop.ask("a checkpoint that was not saved"),
        report=report,
    )


def is_due(step: int, every: int, loop: LoopConfig) -> bool:
    """Return whether what is done each ``every`` steps (0: at the end only) is due."""
    return step == loop.max_steps or bool(every and step % every == 0)


def log(stage: TrainStage, sinks: Sinks, step: int) -> None:
    """Bring the figures of the last steps to the host once, and record them."""
    policy = stage.policy
    metrics = stage.bag.drain(sum_tensor)
    stage.guard.check()
    metrics |= stage.guard.counts()
    metrics |= {"lr": stage.lr(step - 1), "grad_norm": float(policy.grad_norm())}
    if policy.precision == "fp16":
        metrics |= {"loss_scale": policy.loss_scale(), "num_overflows": stage.guard.num_overflows}
    metrics |= stage.progress()
    slowest = stage.meters.own.read(gather_texts, gather_figures)
    metrics |= slowest.figures() if slowest else {}
    sinks.train(step, metrics | stage.meters.read(step))
    if slowest:
        sinks.ranks(step, median_s=slowest.median_s, slowest=slowest.ranks)


def save(
    stage: TrainStage,
    context: Context,
    saver: Saver,
    step: int,
    evaluated: bool,
    stop: StopRequest,
) -> None:
    """Begin to save finite weights; before that, the checkpoint before it is committed."""
    stage.guard.check()
    if context.config.guard.compare_every:
        compare_replicas(stage.policy, step)
    state = {**stage.state(), "evaluated": evaluated, "num_overflows": stage.guard.num_overflows}
    state["guard"] = stage.guard.state()
    with stage.meters.pause(), heartbeat.phase("save", step):
        saver.wait()
        stop.deadline.begin_save()
        state["seconds"] = {describe_ranks(stage, context): stop.deadline.measured()}
        saver.begin(step, state, stop.cause)
