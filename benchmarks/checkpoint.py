"""What saving and resuming cost: blocking, beside training, staged, LoRA; DeepSpeed, torch.save.

    python benchmarks/checkpoint.py                     # CPU or GPUs; 3 minutes on 2 cores
    python benchmarks/checkpoint.py --engines zero3 --ranks 1 --folder /lustre/me --staging /nvme
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py   # as in train.py

A LLaMA of 58 M parameters from scratch is trained in full, then with LoRA, on the same ranks. The
ways take turns, several times, with an optimizer step between them:

blocking      ``loop.save_async=false``: training stands still until the checkpoint is committed
asynchronous  the default: a copy in host memory, a thread that writes
staged        ``loop.staging_dir``: a copy on the node's disk, a thread that copies it
deepspeed     ``save_checkpoint`` of DeepSpeed's engine: pickles, no hashes, left to the page cache
torch_save    ``torch.save`` of the tensors that a checkpoint holds, likewise

stall_s    training stands still; first_stall_s of the first save, which takes the memory
durable_s  until it is committed and synced; for the last two until their files are synced as well
restore_s  finding, verifying and loading it, from the disk: its files are dropped from memory
step_s     an optimizer step while nothing is saved, and while the save goes on

The median of the repeats counts, of the slowest rank. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.ranks import compose_case, report, run_ranks, start_rank  # noqa: E402
from benchmarks.inputs.run_inputs import ARCHITECTURE, NUM_ROWS, find_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from trainer.engine.engine import Engine

SEQ = 256  # tokens of the step between two saves


def main() -> None:
    """Measure every engine in fresh processes and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["zero2"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="what is written to; default: a temporary one")
    parser.add_argument("--staging", type=Path, default=Path("/dev/shm"), help="of the node")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one rank of a case, as JSON
    args = parser.parse_args()
    if args.rank:
        run_rank(json.loads(args.rank))
        return
    results = []
    for engine in args.engines:
        for peft in ("full", "lora"):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                results.append(measure_case(engine, peft, args, Path(folder)))
    print(json.dumps({"benchmark": "checkpoint", "results": results, "ratios": ratios(results)}))


def measure_case(engine: str, peft: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the ranks of one engine; print its lines of the table and return its figures."""
    tokenizer = find_tokenizer(None, folder)
    num_tokens = SEQ * args.ranks
    extra = [f"peft={peft}", f"data.max_length={SEQ}", f"loop.global_batch_tokens={num_tokens}"]
    values = compose_case(engine, args.precision, tokenizer, folder, extra)
    values["model"] |= {"path": str(make_base(folder)), "architecture": None}
    case = {"repeats": args.repeats, "values": values, "tokenizer": str(tokenizer)}
    case |= {"folder": str(folder), "staging": str(args.staging)}
    result: dict[str, Any] = {"engine": engine, "peft": peft, "ranks": args.ranks}
    result |= run_ranks(__file__, args.ranks, case, f"{engine}, peft={peft}")
    show(result)
    return result


def make_base(folder: Path) -> Path:
    """Write a model from scratch: adapters are tied to a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **ARCHITECTURE, vocab_size=NUM_ROWS)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    return folder / "base"


def show(result: dict[str, Any]) -> None:
    """Print a line for each way."""
    case = f"{result['engine']:6} {result['peft']:5}{result['ranks']} ranks {result['precision']}"
    for way, figures in result["ways"].items():
        numbers = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{case} {way:13}{numbers}", flush=True)


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return what is compared, from figures of one run."""
    full, lora = results[0]["ways"], results[1]["ways"]
    blocking = full["blocking"]
    gb_per_s = {way: full[way]["gigabytes"] / full[way]["durable_s"] for way in full}
    found = {
        "asynchronous_stall": full["asynchronous"]["stall_s"] / blocking["stall_s"],
        "staged_stall": full["staged"]["stall_s"] / blocking["stall_s"],
        "deepspeed_stall": full["deepspeed"]["stall_s"] / blocking["stall_s"],
        "blocking_against_deepspeed_gb_per_s": gb_per_s["blocking"] / gb_per_s["deepspeed"],
        "restore_against_deepspeed": blocking["restore_s"] / full["deepspeed"]["restore_s"],
        "lora_size": lora["blocking"]["gigabytes"] / blocking["gigabytes"],
        "step_beside_a_save": full["asynchronous"]["busy_step_s"]
        / full["asynchronous"]["idle_step_s"],
    }
    return {name: round(value, 4) for name, value in found.items()}


def run_rank(case: dict[str, Any]) -> None:
    """Measure all ways as one rank; rank 0 prints what it took."""
    from trainer.engine.collectives import barrier, gather_figures

    engine, _ = start_rank(case["values"], case["tokenizer"])
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ways = make_ways(engine, Path(case["folder"]), case["staging"])
    for _ in range(case["repeats"]):
        for name, way in ways.items():
            idle = train_step(engine)
            if engine.rank == 0:
                os.sync()
            barrier()
            for key, value in {"idle_step_s": idle, **way()}.items():
                measured[name][key].append(max(gather_figures([value]))[0])
    summary = {name: summarise(figures) for name, figures in measured.items()}
    report(engine.rank, {"precision": engine.precision, "ways": summary})


def summarise(figures: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians, and apart from them what the first save stood still."""
    medians = {key: statistics.median(values[1:] or values) for key, values in figures.items()}
    return {**medians, "first_stall_s": figures["stall_s"][0]}


def train_step(engine: Engine) -> float:
    """Change all weights and moments; return the seconds."""
    import torch

    start = time.perf_counter()
    ids = torch.randint(3, 250, (1, SEQ), device=engine.device)
    positions = torch.arange(SEQ, device=engine.device)[None]
    loss = engine(input_ids=ids, position_ids=positions, labels=ids)
    engine.backward(loss / SEQ)
    engine.step(1e-5)
    float(loss.detach())
    return time.perf_counter() - start


def make_ways(
    engine: Engine, folder: Path, staging: str
) -> dict[str, Callable[[], dict[str, float]]]:
    """Return what saves and restores the engine once, by name."""
    others = {
        "deepspeed": (
            lambda place: engine.engine.save_checkpoint(str(place), tag="now"),
            lambda place: engine.engine.load_checkpoint(str(place), tag="now"),
        ),
        "torch_save": (partial(save_tensors, engine), partial(load_tensors, engine)),
    }
    return {
        "blocking": OurWay(engine, folder / "blocking", save_async=False).measure,
        "asynchronous": OurWay(engine, folder / "asynchronous").measure,
        "staged": OurWay(engine, folder / "staged", staging_dir=staging).measure,
    } | {
        name: partial(measure_other, folder / name, engine.rank, *calls)
        for name, calls in others.items()
    }


class OurWay:
    """Saves as training does, with optimizer steps while a save goes on."""

    def __init__(self, engine: Engine, folder: Path, **loop: Any) -> None:
        from trainer.config import LoopConfig
        from trainer.engine.saver import Saved, Saver

        self.engine, self.place, self.step = engine, folder / "checkpoints", 0
        self.committed: list[Saved] = []
        rules = LoopConfig(keep_last=1, **loop)
        self.saver = Saver(engine, self.place, rules, report=self.committed.append)

    def measure(self) -> dict[str, float]:
        """Save once, then restore it."""
        from trainer.engine.collectives import any_over_ranks

        self.step += 1
        start = time.perf_counter()
        self.saver.begin(self.step, {})
        stall, busy = time.perf_counter() - start, []
        while any_over_ranks(not self.committed):
            busy.append(train_step(self.engine))
            self.saver.poll()
        self.saver.wait()
        saved = self.committed.pop()
        figures = {"stall_s": stall, "durable_s": saved.seconds}
        figures |= {"busy_step_s": statistics.mean(busy)} if busy else {}
        return figures | restored(self.load, saved.path)

    def load(self) -> None:
        """Find, verify and load the newest checkpoint."""
        from trainer.engine import checkpoint
        from trainer.engine.committed import find_newest

        newest = find_newest(self.place)
        assert newest is not None
        checkpoint.load(self.engine, newest)


def save_tensors(engine: Engine, place: Path) -> None:
    """Save what this rank has of a checkpoint as torch does."""
    import torch

    from trainer.engine.checkpoint import iterate_tensors

    tensors = {key: view.detach().to("cpu", copy=True) for key, view in iterate_tensors(engine)}
    torch.save(tensors, place / f"rank_{engine.rank}.pt")


def load_tensors(engine: Engine, place: Path) -> None:
    """Load it."""
    import torch

    from trainer.engine.checkpoint import iterate_tensors

    kept = torch.load(place / f"rank_{engine.rank}.pt", weights_only=True)
    for key, view in iterate_tensors(engine):
        view.detach().copy_(kept[key])


def measure_other(
    place: Path, rank: int, save: Callable[[Path], object], load: Callable[[Path], object]
) -> dict[str, float]:
    """Save and restore once in another way."""
    from trainer.engine.collectives import barrier

    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    barrier()
    start = time.perf_counter()
    save(place)
    stall = time.perf_counter() - start
    barrier()
    sync_files(place)
    figures = {"stall_s": stall, "durable_s": time.perf_counter() - start}
    return figures | restored(partial(load, place), place)


def restored(load: Callable[[], object], place: Path) -> dict[str, float]:
    """Return what loading takes, and the bytes that lie there."""
    from trainer.engine.collectives import barrier

    barrier()
    files = [path for path in place.rglob("*") if path.is_file()]
    for path in files:
        drop_cached(path)
    barrier()
    start = time.perf_counter()
    load()
    barrier()
    seconds = time.perf_counter() - start
    return {"restore_s": seconds, "gigabytes": sum(p.stat().st_size for p in files) / 1e9}


def drop_cached(path: Path) -> None:
    """Let a file be read from its disk, as in a job that starts elsewhere or much later."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_files(folder: Path) -> None:
    """Wait until what was written is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


if __name__ == "__main__":
    main()
