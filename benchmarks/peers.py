"""Fine-tuning against LLaMA-Factory and TRL, which live in another environment.

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install llamafactory trl
    KUROSHIO_PEERS_PYTHON=/tmp/peers/bin/python python benchmarks/peers.py --precision fp32

Without the variable there is nothing to compare, and the script says so. Give that environment the
same torch build, or the comparison is one of builds; both versions are printed. The model (58 M
LLaMA from scratch), the conversations, the cut at 512 tokens and the rows of a step are those of
``sft.py``; the peers' other settings are their defaults. ``packed`` is LLaMA-Factory's ``packing``
and TRL's ``packing`` as they run on this device, where packed conversations may see each other;
``neat`` is LLaMA-Factory's ``neat_packing``, isolated as ours are. Their bf16 is autocast over fp32
weights, ours bf16 weights with fp32 masters. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.chat_inputs import (  # noqa: E402
    chat_overrides,
    find_conversations,
    read_examples,
)
from benchmarks.inputs.run_inputs import find_tokenizer, place_of_ranks  # noqa: E402
from benchmarks.inputs.turns import RankGroup, take_turns  # noqa: E402
from benchmarks.sft import PADDED_STEPS, describe, start_variants  # noqa: E402

VARIABLE = "KUROSHIO_PEERS_PYTHON"
OURS = ("ours-packed", "bare-packed", "ours-padded")
PEERS = (
    *("llamafactory-packed", "llamafactory-neat", "llamafactory-padded"),
    *("trl-packed", "trl-padded"),
)


def main() -> None:
    """Start ours and the peers, give them turns, print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = (*OURS, *PEERS)
    parser.add_argument("--variants", nargs="+", default=list(names), choices=names)
    parser.add_argument("--engine", default="zero0")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path, help="a file of conversations")
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    options = {key: str(value) for key, value in vars(args).items()}
    result: dict[str, Any] = {"benchmark": "peers", "options": options}
    python = os.environ.get(VARIABLE)
    if not python:
        print(f"{VARIABLE} is not set: no peers to compare with; see the beginning of {__file__}")
        print(json.dumps(result | {"skipped": f"{VARIABLE} is not set"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(args, python, Path(folder))
    describe(figures)
    print(json.dumps(result | {"results": figures}))


def compare(args: argparse.Namespace, python: str, folder: Path) -> dict[str, Any]:
    """Return the figures of every variant; peers that are not installed are left out, and named."""
    ours = [name for name in args.variants if name in OURS]
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(group) for group in start_variants(args, ours, folder)]
        peers = [name for name in args.variants if name in PEERS]
        for group in start_peers(args, python, peers, folder):
            groups.append(stack.enter_context(group))
        return take_turns(groups, args.turns)


def start_peers(
    args: argparse.Namespace, python: str, names: list[str], folder: Path
) -> Iterator[RankGroup]:
    """Write what the peers read and start them."""
    from trainer.engine.engine import choose_precision

    installed = {peer for peer in ("llamafactory", "trl") if is_installed(python, peer)}
    paths = write_peer_files(args, folder)
    for name in names:
        peer, _, way = name.partition("-")
        if peer not in installed:
            print(f"{name}: {peer} is not installed in {python}")
            continue
        case = {
            "peer": peer,
            "packed": way != "padded",
            "isolated": way == "neat",
            "precision": choose_precision(args.precision),
            "steps": PADDED_STEPS if way == "padded" else 1,
            "micro_batch_size": args.micro_batch_size,
            "num_micro_batches": args.rows // args.micro_batch_size,
            "out": str(folder / name),
            **paths,
        }
        file = folder / f"{name}.json"
        file.write_text(json.dumps(case), encoding="utf-8")
        script = str(ROOT / "benchmarks" / "inputs" / "peer_loop.py")
        environ = place_of_ranks(1) | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        yield RankGroup(name, [python, script, str(file)], environ, folder)


def is_installed(python: str, package: str) -> bool:
    """Ask another environment for a package."""
    ask = f"import importlib.metadata as m; m.version({package!r})"
    return subprocess.run([python, "-c", ask], capture_output=True, check=False).returncode == 0


def write_peer_files(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write the model, the conversations as LLaMA-Factory's data set, and as tokens for TRL."""
    from launch.compose import compose_values
    from tokenizer.load import load_tokenizer
    from trainer.config import load_config
    from trainer.data.prepared.prepare import ensure_prepared
    from trainer.models.load import load_model, make_config

    conversations = find_conversations(args.data)
    tokenizer_path = find_tokenizer(args.tokenizer, folder)
    overrides = chat_overrides(conversations, tokenizer_path, folder)
    config = load_config(compose_values([*overrides, f"run_dir='{folder / 'peers'}'"]))
    ensure_prepared(config.data, tokenizer_path)
    tokenizer = load_tokenizer(str(tokenizer_path))
    import torch

    hf_config = make_config(config.model, len(tokenizer), {})
    model = load_model(config.model, hf_config, torch.float32, config.loop.seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    examples = [
        {"input_ids": e["input_ids"], "completion_mask": [int(i >= 0) for i in e["labels"]]}
        for e in read_examples(config)
    ]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "examples": str(folder / "examples.json"),
        "dataset": str(write_dataset(conversations, folder / "dataset")),
    }


def write_dataset(conversations: Path, folder: Path) -> Path:
    """Write a LLaMA-Factory data folder that holds one file; return that file."""
    folder.mkdir()
    entry: dict[str, Any] = {"file_name": conversations.name}
    if conversations.suffix == ".jsonl":
        tags = {"role_tag": "role", "content_tag": "content"}
        tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
        entry |= {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    file = folder / conversations.name
    file.write_bytes(conversations.read_bytes())
    info = json.dumps({conversations.stem: entry})
    (folder / "dataset_info.json").write_text(info, encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
