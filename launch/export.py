"""``kuroshio export RUN OUT``: a trained run as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import run_folder
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.engine.committed import Checkpoint

DTYPE_NAMES = ("auto", "fp32", "bf16", "fp16")


def main(argv: Sequence[str]) -> int:
    """Export the newest (or a chosen) checkpoint of a run; return the exit code."""
    options = _parse(argv)
    config = load_config(run_folder.read(options.run / run_folder.CONFIG_FILE))
    if config.stage["name"] == "vocab":
        raise ConfigError(
            f"{options.run} is a vocabulary run: its model is already a plain folder, "
            f"{options.run / 'model'}"
        )
    from trainer.engine.committed import find_checkpoint
    from trainer.models.aside import written_aside

    checkpoint = find_checkpoint(options.run / "checkpoints", options.step)
    with written_aside(options.out) as folder:
        num_params, precision, num_padding = _write_model(config, options, checkpoint, folder)
        _write_card(config, options.run, checkpoint, folder, num_params, precision, num_padding)
    print(f"{options.out}: {num_params:,} parameters in {precision}, step {checkpoint.step}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kuroshio export", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--step", type=int, help="checkpoint to export; default the newest")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="auto", help="auto: the run's precision"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=4.0, help="largest file, in 1e9 bytes"
    )
    return parser.parse_args(argv)


def _write_model(
    config: RunConfig, options: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> tuple[int, str, int]:
    """Write weights, configs and tokenizer; return (parameters, precision, padding rows)."""
    import torch
    from rich.progress import track
    from transformers import GenerationConfig

    from tokenizer.load import load_tokenizer, num_ids, sentencepiece_file, write_pair_manifest
    from tokenizer.load import save_tokenizer as save
    from trainer.engine.committed import Reader
    from trainer.models.adapter_files import run_adapter
    from trainer.models.export import Weights, write_shards
    from trainer.models.load import find_aliases, make_config

    tokenizer_path = options.run / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_path)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    precision = checkpoint.manifest["precision"] if options.dtype == "auto" else options.dtype
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model_config = make_config(config.model, num_ids(tokenizer), special)
    model_config.dtype = dtype
    model_config.save_pretrained(folder)
    reader = Reader(checkpoint)
    base = Path(config.model.path) if config.model.path else None
    adapter = run_adapter(options.run)
    aliases = find_aliases(model_config)
    weights = Weights(reader.shapes, reader.read_whole, base, adapter, aliases)
    num_params = write_shards(
        weights,
        folder,
        dtype,
        int(options.max_shard_gb * 1e9),
        lambda shards: track(shards, "writing shards", transient=True),
    )
    generation = {k: v for k, v in special.items() if v is not None}
    padding = list(range(num_ids(tokenizer), model_config.vocab_size))
    if padding:  # rows that pad the matrix to a round size are no tokens
        generation["suppress_tokens"] = padding
    GenerationConfig(**generation).save_pretrained(folder)
    model_file = sentencepiece_file(tokenizer_path)
    save(tokenizer, folder, model_file.read_bytes() if model_file else None)
    write_pair_manifest(folder, folder)
    return num_params, precision, len(padding)


def _write_card(
    config: RunConfig,
    run_dir: Path,
    checkpoint: Checkpoint,
    folder: Path,
    num_params: int,
    precision: str,
    num_padding: int,
) -> None:
    """Write README.md: data, hyperparameters and what was measured."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from trainer.metrics.journal import read_journal

    evaluations = [r for r in read_journal(run_dir / "metrics.jsonl") if r["split"] == "eval"]
    evaluations = [r for r in evaluations if r["step"] <= checkpoint.step]
    templates = Environment(
        loader=PackageLoader("launch", "."), undefined=StrictUndefined, trim_blocks=True
    )
    card = templates.get_template("model_card.md.j2").render(
        config=config,
        step=checkpoint.step,
        tokens=checkpoint.state["tokens"],
        num_params=num_params,
        precision=precision,
        num_ranks=checkpoint.manifest["world_size"],
        zero_stage=checkpoint.manifest["zero_stage"],
        shares=_shares(config),
        num_padding=num_padding,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if evaluations else None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _shares(config: RunConfig) -> dict[str, float]:
    """Return each source's share of the training rows."""
    total: Any = sum(source.weight for source in config.data.sources.values()) or 1.0
    return {name: source.weight / total for name, source in config.data.sources.items()}
