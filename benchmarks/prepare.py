"""Data preparation against ``datasets.map`` with the same tokenizer, in MB of text a second.

    python benchmarks/prepare.py                     # Chinese files and LLaMA-2's tokenizer
    python benchmarks/prepare.py FILE... --tokenizer PATH --processes 1 2 8

Both sides begin with the tokenizer's path. ``datasets`` has its rows in its Arrow cache already and
leaves ids there; ``kuroshio prepare`` goes from the files to the committed store, so reading and
hashing them is on its side of the clock only. Speeds are per second of wall time and, so that a
busy machine says the same, per second of processor time of all processes together. Prints a table,
then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Measure with each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files with a `text` column")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers/llama2")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2, help="the best time counts")
    args = parser.parse_args()
    args.files = args.files or sorted(map(str, DATA.glob("pretrain/*.jsonl.gz")))
    if not args.files or not args.tokenizer.exists():
        parser.error(f"there is no {DATA} here: name files and give --tokenizer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one core on both sides
    results = [measure(args.files, args.tokenizer, n, args.repeats) for n in args.processes]
    line = (
        "{processes} processes, {text_mb:.1f} MB: datasets.map {map_mb_per_s:.2f} MB/s, "
        "kuroshio {kuroshio_mb_per_s:.2f} MB/s, ratio {wall_ratio:.2f}; per core-second "
        "{map_mb_per_core_s:.2f} and {kuroshio_mb_per_core_s:.2f} MB, ratio {core_ratio:.2f}"
    )
    for result in results:
        print(line.format(**result))
    names = [Path(file).name for file in args.files]
    print(json.dumps({"benchmark": "prepare", "files": names, "results": results}))


def measure(
    files: list[str], tokenizer_path: Path, num_processes: int, repeats: int
) -> dict[str, float]:
    """Prepare the files both ways, in turns; return MB/s of each and their ratios."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    from tokenizer.load import load_tokenizer
    from trainer.config import DataConfig, SourceConfig
    from trainer.data.prepared.prepare import prepare
    from trainer.data.reading.readers import read_documents
    from trainer.data.reading.records import RejectLog

    disable_caching()
    disable_progress_bars()
    source = SourceConfig(paths=files)
    texts = [document.text for document in read_documents(source, "files", RejectLog(None, 1.0))]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    num_proc = num_processes if num_processes > 1 else None
    times: dict[str, list[tuple[float, float]]] = {"map": [], "kuroshio": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            Dataset.from_dict({"text": texts}).save_to_disk(f"{folder}/rows")
            rows = Dataset.load_from_disk(f"{folder}/rows")

            def run_map(rows: Dataset = rows) -> None:
                tokenizer = load_tokenizer(tokenizer_path)
                rows.map(
                    lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
                    batched=True,
                    remove_columns=["text"],
                    num_proc=num_proc,
                )

            data = DataConfig({"files": source}, store_dir=folder, num_processes=num_processes)
            times["map"].append(clock(run_map))
            times["kuroshio"].append(clock(lambda data=data: prepare(data, tokenizer_path)))
    return {"processes": num_processes, "text_mb": megabytes, **compare(times, megabytes)}


def compare(times: dict[str, list[tuple[float, float]]], megabytes: float) -> dict[str, float]:
    """Turn the best times of both sides into speeds and ratios."""
    best = {
        name: [min(column) for column in zip(*runs, strict=True)] for name, runs in times.items()
    }
    return {
        "map_mb_per_s": megabytes / best["map"][0],
        "kuroshio_mb_per_s": megabytes / best["kuroshio"][0],
        "wall_ratio": best["map"][0] / best["kuroshio"][0],
        "map_mb_per_core_s": megabytes / best["map"][1],
        "kuroshio_mb_per_core_s": megabytes / best["kuroshio"][1],
        "core_ratio": best["map"][1] / best["kuroshio"][1],
    }


def clock(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall and the processor seconds of ``work`` and the processes it ended."""
    began, used = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - began, processor_seconds() - used


def processor_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    usages = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
