"""Training step of the real loop against a bare PyTorch loop over the same model and batches.

    python benchmarks/train.py                       # CPU or the first GPU; 3 minutes on 2 cores
    python benchmarks/train.py --precision fp32 --engines zero2 --ranks 2
    OMP_NUM_THREADS=1 python benchmarks/train.py     # threads that wait for a busy core spin: this
                                                     # keeps the waiting out of the processor time

The bare loop is what one would write by hand: transformers' model and its own loss, the loader's
rows, AdamW(fused=True) over two groups, gradient clipping, the same learning rates, one
``loss.item()`` a step; DistributedDataParallel around the model on several ranks. In bf16 and fp16
the weights are of that precision and the optimizer works on an fp32 copy of them, as ours does;
torch.autocast would be other arithmetic (it casts the fp32 weights in every forward) and is not
compared. Gradients of several micro-batches add up in the precision of the weights, as under
ZeRO-0; ZeRO-1 and 2 add them in fp32.

Ours is the ``pretrain`` stage under ``fit``, with its log lines, ``metrics.jsonl`` and guards.
Every variant has processes of its own, all are alive at once and take turns of a few steps, so
that what else the machine does meets them alike. The median over the turns counts, in wall time
and in processor time of all threads and ranks. Memory is the peak of one rank above what it held
before the model was made: resident memory on a CPU, allocated memory on a GPU. Prints a table, then
one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs.run_inputs import find_tokenizer, overrides  # noqa: E402

from trainer.plan.schedule import lr_factor  # noqa: E402

if TYPE_CHECKING:
    import torch

    from trainer.data.collate import Batch
    from trainer.stage import Context


def main() -> None:
    """Start the variants, give them turns, print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["zero0", "zero2"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--tokenizer", type=Path, help="its size decides the model's rows")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one rank of a variant, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    print(json.dumps(result))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of every variant and their ratios to the bare loop's."""
    from launch.compose import compose_values
    from trainer.config import load_config
    from trainer.data.prepare import ensure_prepared

    tokenizer = find_tokenizer(args.tokenizer, folder)
    common = [
        *overrides(tokenizer, folder),
        f"engine.precision={args.precision}",
        f"loop.micro_batch_size={args.micro_batch_size}",
        f"loop.global_batch_tokens={args.global_batch_tokens}",
        "loop.max_steps=1000000",
    ]
    variants = {}
    for name in ["bare", *args.engines]:
        engine = "zero0" if name == "bare" else name
        run_dir = f"run_dir='{folder / name}'"
        variants[name] = compose_values([*common, f"engine={engine}", run_dir])
    ensure_prepared(load_config(variants["bare"]).data, tokenizer)
    with contextlib.ExitStack() as stack:
        groups = {
            name: stack.enter_context(RankGroup(name, values, args.ranks, args.steps, folder))
            for name, values in variants.items()
        }
        for turn in range(args.turns + 1):  # the first warms up
            for group in groups.values():
                group.take_turn(count=turn > 0)
        figures = {name: group.finish() for name, group in groups.items()}
    return describe(figures, args)


def describe(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return everything as plain data."""
    bare = figures["bare"]
    print(
        f"{bare['num_params'] / 1e6:.1f} M parameters, {bare['precision']} on {bare['device']}, "
        f"{args.ranks} ranks, {args.global_batch_tokens} tokens a step in micro-batches of "
        f"{args.micro_batch_size} rows; load average {os.getloadavg()[0]:.1f}"
    )
    for name, own in figures.items():
        own["speed_ratio"] = ratio(bare["turn_wall_s"], own["turn_wall_s"])
        own["cpu_speed_ratio"] = ratio(bare["turn_cpu_s"], own["turn_cpu_s"])
        own["memory_ratio"] = own["peak_mb"] / bare["peak_mb"]
        print(
            f"{name:14} {own['tokens_per_s']:9.0f} tokens/s, {own['tokens_per_cpu_s']:9.0f} per "
            f"processor second, peak {own['peak_mb']:6.0f} MB: {own['speed_ratio']:.3f}, "
            f"{own['cpu_speed_ratio']:.3f} and {own['memory_ratio']:.2f} of bare; "
            f"loss {own['loss']:.4f}"
        )
    return {
        "benchmark": "train",
        "options": {k: str(v) for k, v in vars(args).items()},
        "results": figures,
    }


def ratio(bare: list[float], ours: list[float]) -> float:
    """Return the median over turns of bare time / our time, each turn beside its neighbour."""
    return statistics.median(b / o for b, o in zip(bare, ours, strict=True))


class RankGroup:
    """The processes of one variant, which work only in their turns."""

    def __init__(
        self, name: str, values: dict[str, Any], num_ranks: int, steps: int, folder: Path
    ) -> None:
        """Start one process a rank."""
        from launch.local import threads_per_rank
        from launch.rendezvous import free_port

        self.reports: list[list[dict[str, Any]]] = []
        port, threads = free_port(), threads_per_rank(num_ranks)
        self.ranks = []
        for rank in range(num_ranks):
            case = {"variant": name, "values": values, "steps": steps}
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
            environ = {"OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, __file__, "--rank", json.dumps(case)]
            self.ranks.append(
                subprocess.Popen(
                    command,
                    env=environ | {key: str(value) for key, value in place.items()},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=(folder / f"{name}.{rank}.log").open("w"),
                    text=True,
                )
            )
        self.logs = [folder / f"{name}.{rank}.log" for rank in range(num_ranks)]

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def take_turn(self, count: bool) -> None:
        """Let all ranks do their steps; keep what they report if it is to ``count``."""
        self._tell("go")
        reports = [self._hear(rank) for rank in range(len(self.ranks))]
        if count:
            self.reports.append(reports)

    def finish(self) -> dict[str, Any]:
        """Return the figures over all turns."""
        wall = [max(report["wall_s"] for report in turn) for turn in self.reports]
        cpu = [sum(report["cpu_s"] for report in turn) for turn in self.reports]
        tokens = [sum(report["tokens"] for report in turn) for turn in self.reports]
        last = self.reports[-1]
        return {
            "tokens_per_s": statistics.median(t / s for t, s in zip(tokens, wall, strict=True)),
            "tokens_per_cpu_s": statistics.median(t / s for t, s in zip(tokens, cpu, strict=True)),
            "peak_mb": max(report["peak_mb"] for report in last),
            "turn_wall_s": wall,
            "turn_cpu_s": cpu,
            **{key: last[0][key] for key in last[0] if key not in PER_TURN},
        }

    def _tell(self, word: str) -> None:
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(f"{word}\n")
            process.stdin.flush()

    def _hear(self, rank: int) -> dict[str, Any]:
        stdout = self.ranks[rank].stdout
        assert stdout is not None
        for line in stdout:  # the loop's own progress lines go there too
            if line.startswith(REPORT):
                report: dict[str, Any] = json.loads(line.removeprefix(REPORT))
                return report
        raise SystemExit(f"rank {rank} ended:\n{self.logs[rank].read_text()}")


REPORT = "report "
PER_TURN = ("wall_s", "cpu_s", "tokens", "peak_mb")


class Turns:
    """A rank's side of the turns: waits for its go, measures, reports."""

    def __init__(self, steps: int, device: torch.device) -> None:
        """Note what memory is in use before the model is made."""
        self.steps, self.device, self.started, self.tokens = steps, device, False, 0
        self.floor = start_peak(device)

    def begin_step(self, step: int, facts: Callable[[], dict[str, Any]]) -> None:
        """Report the last turn, ``facts`` with it, and wait for the next one if it is due.

        Args:
            step: from 0.
            facts: called when the clock has stopped.
        """
        if step % self.steps:
            return
        if self.started:
            synchronize(self.device)
            report = {
                "wall_s": time.perf_counter() - self.wall,
                "cpu_s": time.process_time() - self.cpu,
                "tokens": self.tokens,
                "peak_mb": (read_peak(self.device) - self.floor) / 1e6,
            }
            print(f"{REPORT}{json.dumps(report | facts())}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # the parent is gone
        self.started, self.tokens = True, 0
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def run_rank(case: dict[str, Any]) -> None:
    """Train one variant until the parent has seen enough."""
    from trainer.config import load_config
    from trainer.engine.engine import init_distributed
    from trainer.stage import Context

    config = load_config(case["values"])
    rank, world_size, local_rank = (
        int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    device = init_distributed(local_rank, config.cluster.timeout_s)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    context = Context(config, run_dir, rank, world_size, local_rank)
    train = train_barely if case["variant"] == "bare" else train_for_real
    train(context, device, case["steps"])


def train_for_real(context: Context, device: torch.device, steps: int) -> None:
    """Run the stage under the real loop."""
    from trainer.stages.pretrain import Pretrain

    class TurnByTurn(Pretrain):
        def train_step(self, step: int, batches: Iterator[Batch]) -> int:
            turns.begin_step(step, self.facts)
            return super().train_step(step, batches)

        def loss(self, batch: Batch) -> torch.Tensor:
            turns.tokens += batch.input_ids.numel()
            return super().loss(batch)

        def facts(self) -> dict[str, Any]:
            journal = (context.run_dir / "metrics.jsonl").read_text().splitlines()
            return {"loss": json.loads(journal[-1])["loss"]}

    turns = Turns(steps, device)
    TurnByTurn().run(context)


def train_barely(context: Context, device: torch.device, steps: int) -> None:
    """Train in plain PyTorch, with the real stage's model, rows and hyperparameters."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from tokenizer.load import load_tokenizer, num_ids
    from trainer.data.loader import TrainLoader
    from trainer.data.prepare import open_store
    from trainer.engine.engine import DTYPES, choose_precision
    from trainer.models.load import load_model, make_config

    config, world_size = context.config, context.world_size
    path = str(config.tokenizer.path)
    store, num_tokens = open_store(config.data, path), num_ids(load_tokenizer(path))
    rows = config.loop.global_batch_tokens // config.data.max_length
    loader = TrainLoader(
        store, config.data, seed=0, rows_per_step=rows, rank=context.rank, world_size=world_size,
        micro_batch_size=config.loop.micro_batch_size,
    )  # fmt: skip
    precision = choose_precision(config.engine.precision)
    turns = Turns(steps, device)
    hf_config = make_config(config.model, num_tokens, {})
    model = load_model(config.model, hf_config, DTYPES[precision], config.loop.seed).to(device)
    weights = list(model.parameters())
    # fp32 copies for the optimizer; in fp32 the weights themselves.
    masters = weights
    if precision != "fp32":
        masters = [torch.nn.Parameter(w.detach().float()) for w in weights]
    optim = config.optim
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optim.betas[0], optim.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    forward = DistributedDataParallel(model) if world_size > 1 else model
    facts: dict[str, Any] = {
        "num_params": sum(map(torch.numel, weights)),
        "precision": precision,
        "device": device.type,
    }
    batches = iter(loader)
    for step in range(config.loop.max_steps):
        turns.begin_step(step, lambda: facts)
        window = list(islice(batches, loader.micro_batches_per_step))
        count = torch.tensor(sum(batch.num_targets for batch in window))
        if world_size > 1:
            torch.distributed.all_reduce(count)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(window, 1):
            wait = world_size > 1 and number < len(window)
            with forward.no_sync() if wait else nullcontext():
                loss = forward(
                    input_ids=batch.input_ids.to(device),
                    position_ids=batch.position_ids.to(device),
                    labels=batch.labels.to(device),
                    num_items_in_batch=count.to(device),
                    use_cache=False,  # or packed documents would see each other
                ).loss
                (loss * world_size).backward()
            total += loss.detach()
            turns.tokens += batch.input_ids.numel()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(
                config.schedule.name,
                step,
                max_steps=config.loop.max_steps,
                warmup_steps=config.schedule.warmup_steps,
                min_lr_ratio=config.schedule.min_lr_ratio,
            )
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        if world_size > 1:
            torch.distributed.all_reduce(total)
        facts["loss"] = total.item()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; a CPU has nothing to wait for."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def start_peak(device: torch.device) -> int:
    """Reset the peak and return the bytes in use now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS; proc(5)
    return read_peak(device)


def read_peak(device: torch.device) -> int:
    """Return the most bytes in use since ``start_peak``."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    main()
