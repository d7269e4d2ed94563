"""``kuroshio export RUN OUT``: a trained run as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import cards, run_folder
from launch.exports import note_export
from launch.final_model import ADAPTER_MODES, REWARD, make_config, open_weights
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.engine.committed import Checkpoint

DTYPE_NAMES = ("auto", "fp32", "bf16", "fp16")
QLORA_MERGE = {
    "original": "merging into the unquantised base: training saw its {kind} form, so this model's "
    "answers differ a little from those during training (--base=dequantized reproduces them)",
    "dequantized": "merging into the base as its {kind} form computes: the model answers as it did "
    "during training, and keeps the rounding of the quantisation in full-size weights",
}


def main(argv: Sequence[str]) -> int:
    """Export the newest (or a chosen) checkpoint of a run; return the exit code."""
    options = _parse(argv)
    config = load_config(run_folder.read(options.run / run_folder.CONFIG_FILE))
    _refuse(config, options)
    from trainer.engine.committed import find_checkpoint
    from trainer.models.aside import written_aside

    checkpoint = find_checkpoint(options.run / "checkpoints", options.step)
    write = _write_adapter if options.adapter else _write_model
    with written_aside(options.out) as folder:
        facts = write(config, options, checkpoint, folder)
        cards.write_card(config, options.run, checkpoint, folder, facts)
    chosen = {key: getattr(options, key) for key in ("dtype", "adapter", "base")}
    note_export(options.run, options.out, checkpoint.path, chosen)
    what = "adapter weights" if options.adapter else "parameters"
    print(
        f"{options.out}: {facts['num_params']:,} {what} in {facts['precision']}, "
        f"step {checkpoint.step}"
    )
    return 0


def _refuse(config: RunConfig, options: argparse.Namespace) -> None:
    """Refuse what the run does not hold."""
    if config.stage["name"] == "vocab":
        raise ConfigError(
            f"{options.run} is a vocabulary run: its model is already a plain folder, "
            f"{options.run / 'model'}"
        )
    if options.adapter and config.peft.mode not in ADAPTER_MODES:
        raise ConfigError(
            f"--adapter: {options.run} was tuned with peft.mode={config.peft.mode} and has no "
            "adapter; leave --adapter out"
        )
    if options.base == "dequantized" and (options.adapter or config.peft.mode != "qlora"):
        raise ConfigError(
            "--base=dequantized merges the adapter of a peft=qlora run into the base as that run "
            f"saw it; {options.run} has peft.mode={config.peft.mode}"
            f"{' and --adapter merges nothing' if options.adapter else ''}"
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kuroshio export", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--step", type=int, help="checkpoint to export; default the newest")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="auto", help="auto: the run's precision"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapter alone, in peft's format"
    )
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="original",
        help="of a qlora run: what the adapter is merged into",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=4.0, help="largest file, in 1e9 bytes"
    )
    return parser.parse_args(argv)


def _write_model(
    config: RunConfig, options: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> dict[str, Any]:
    """Write the merged model and its tokenizer; return what the card says of them."""
    from rich.progress import track
    from transformers import GenerationConfig

    from tokenizer.load import load_tokenizer, num_ids
    from tokenizer.pair import write_pair_manifest
    from trainer.engine.committed import Reader
    from trainer.engine.precision import DTYPES
    from trainer.models.export import write_shards
    from trainer.models.identity import model_identity
    from trainer.models.load import special_ids

    tokenizer = load_tokenizer(options.run / "tokenizer")
    special = special_ids(tokenizer)
    model_config = make_config(config, tokenizer, checkpoint)
    precision = _precision(options, checkpoint)
    model_config.dtype = DTYPES[precision]
    model_config.save_pretrained(folder)
    _copy_code(config, folder)
    _say_what_is_lost(config, options, model_config)
    num_params = write_shards(
        open_weights(config, options.run, model_config, Reader(checkpoint), options.base),
        folder,
        DTYPES[precision],
        int(options.max_shard_gb * 1e9),
        lambda shards: track(shards, "writing shards", transient=True),
    )
    generation: dict[str, Any] = {k: v for k, v in special.items() if v is not None}
    generation |= _stop_ids(config, tokenizer)
    padding = list(range(num_ids(tokenizer), model_config.get_text_config().vocab_size))
    if padding:  # rows that pad the matrix to a round size are no tokens
        generation["suppress_tokens"] = padding
    if config.stage["name"] != REWARD:
        GenerationConfig(**generation).save_pretrained(folder)
    _copy_tokenizer(tokenizer, options.run / "tokenizer", folder)
    write_pair_manifest(folder, folder, {"model_identity": model_identity(folder)})
    return {
        "num_params": num_params,
        "precision": precision,
        "num_padding": len(padding),
        "is_adapter": False,
        "base_kind": options.base,
    }


def _say_what_is_lost(config: RunConfig, options: argparse.Namespace, model_config: Any) -> None:
    """Print in what the exported model is not what was trained, or cannot be used."""
    if config.peft.mode == "qlora":
        print(QLORA_MERGE[options.base].format(kind=config.peft.quantization))
    if config.stage["name"] == REWARD and model_config.pad_token_id is None:
        print(
            "the tokenizer has no special token but those that end an answer: nothing can pad "
            "batches (config.json has pad_token_id=null), so score one text at a time"
        )


def _write_adapter(
    config: RunConfig, options: argparse.Namespace, checkpoint: Checkpoint, folder: Path
) -> dict[str, Any]:
    """Write the adapter, its tokenizer and its base's identity; return what the card says."""
    from tokenizer.load import MANIFEST_NAME, fingerprint, load_tokenizer
    from trainer.engine.committed import Reader
    from trainer.engine.precision import DTYPES
    from trainer.models.actor_critic import policy_shapes
    from trainer.models.adapter_files import FORMAT, known_base, run_adapter
    from trainer.models.adapter_files import write_adapter_config as write_config
    from trainer.models.export import write_adapter

    base, reader = known_base(options.run, str(config.model.path)), Reader(checkpoint)
    precision = _precision(options, checkpoint)
    write_config(
        folder,
        {
            **(run_adapter(options.run) or {}),
            "base_model_name_or_path": base["name"],
            "inference_mode": True,
        },
    )
    num_params = write_adapter(
        policy_shapes(reader.shapes), reader.read_whole, folder, DTYPES[precision]
    )
    path = options.run / "tokenizer"
    _copy_tokenizer(load_tokenizer(path), path, folder)
    quantization = config.peft.quantization if config.peft.mode == "qlora" else None
    manifest = {
        "format": FORMAT,
        "base": base,
        "trained_on_quantization": quantization,
        "tokenizer_fingerprint": fingerprint(folder),
        "stage": config.stage["name"],
        "step": checkpoint.step,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return {"num_params": num_params, "precision": precision, "num_padding": 0, "is_adapter": True}


def _precision(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    return str(checkpoint.manifest["precision"] if options.dtype == "auto" else options.dtype)


def _copy_tokenizer(tokenizer: Any, path: Path, folder: Path) -> None:
    from tokenizer.load import save_tokenizer, sentencepiece_file

    model_file = sentencepiece_file(path)
    save_tokenizer(tokenizer, folder, model_file.read_bytes() if model_file else None)


def _copy_code(config: RunConfig, folder: Path) -> None:
    """Keep a model's own code beside it; loading it elsewhere asks for permission again."""
    if config.model.trust_remote_code and config.model.path:
        base = Path(config.model.path)
        for file in sorted(base.rglob("*.py")):
            target = folder / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


def _stop_ids(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the ids that end an answer, for a model tuned on chats."""
    from trainer.data.chats.chat import stop_token_ids

    if config.data.content == "documents":
        return {}
    return {"eos_token_id": stop_token_ids(tokenizer)}
