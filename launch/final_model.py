"""What an export of a run holds: its config, and its final weights, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import RunConfig

if TYPE_CHECKING:
    from trainer.engine.committed import Checkpoint, Reader
    from trainer.models.export import Weights

ADAPTER_MODES = ("lora", "qlora")
REWARD = "reward"  # the stage whose model is a classifier


def open_final_weights(
    config: RunConfig, run_dir: Path, checkpoint: Checkpoint, base_kind: str
) -> Weights:
    """Return the weights that an export of a checkpoint has; ``base_kind`` as in `open_weights`."""
    from tokenizer.load import load_tokenizer
    from trainer.engine.committed import Reader

    model_config = make_config(config, load_tokenizer(run_dir / "tokenizer"), checkpoint)
    return open_weights(config, run_dir, model_config, Reader(checkpoint), base_kind)


def make_config(config: RunConfig, tokenizer: Any, checkpoint: Checkpoint) -> Any:
    """Return the transformers config to write; a reward model's says how it is to be padded.

    Args:
        config: of the run.
        tokenizer: the run's; a reward model's gets the padding token.
        checkpoint: whose weights are written.
    """
    from tokenizer.load import num_ids
    from trainer.models import load
    from trainer.models.load import outline, special_ids
    from trainer.models.scalar_model import SCALAR, scalar_config, statistics_config

    inputs = config.model, num_ids(tokenizer), special_ids(tokenizer)
    if config.stage["name"] != REWARD:
        return load.make_config(*inputs)
    from trainer.data.chats.chat import stop_token_ids

    model_config = scalar_config(*inputs)
    model_config.architectures = [type(outline(model_config, SCALAR)).__name__]
    model_config.update(statistics_config(checkpoint.state["reward_stats"]))
    padding = padding_token(tokenizer, stop_token_ids(tokenizer))
    model_config.pad_token_id = padding
    if padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return model_config


def padding_token(tokenizer: Any, ends: Sequence[int]) -> int | None:
    """Return the id that pads texts to be scored; transformers scores the last other one.

    Padding with a token that ends answers would hide the end, where the score is. The start token
    never ends an answer.

    Args:
        tokenizer: the run's.
        ends: ids that end an answer.
    """
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    every = [*known, *tokenizer.all_special_ids]
    return next((int(i) for i in every if i is not None and i not in ends), None)


def open_weights(
    config: RunConfig, run_dir: Path, model_config: Any, reader: Reader, base_kind: str
) -> Weights:
    """Return the run's final weights, to be read one at a time; nothing is written.

    Args:
        config: of the run.
        run_dir: its folder.
        model_config: from ``make_config``.
        reader: of the checkpoint.
        base_kind: what adapters of a qlora run are merged into: ``original`` or ``dequantized``.

    Raises:
        ConfigError: the base is not what the run began with.
    """
    from functools import partial

    from trainer.engine.precision import DTYPES
    from trainer.models.actor_critic import policy_shapes
    from trainer.models.adapter_files import known_base, run_adapter
    from trainer.models.export import Weights, transposed_weights
    from trainer.models.identity import refuse_other_base
    from trainer.models.load import LANGUAGE, find_aliases, initial_buffers, outline
    from trainer.models.quantize import as_quantized, quantized_weights, require_bitsandbytes
    from trainer.models.scalar_model import SCALAR
    from trainer.models.stored_names import superseded_names

    auto = SCALAR if config.stage["name"] == REWARD else LANGUAGE
    model, shapes = outline(model_config, auto), policy_shapes(reader.shapes)
    base = Path(config.model.path) if config.model.path else None
    if config.peft.mode in ADAPTER_MODES:
        known_base(run_dir, str(config.model.path))
    elif config.peft.mode == "freeze":
        refuse_other_base(Path(str(config.model.path)), reader.checkpoint.state["inputs"])
    as_trained = None
    if base_kind == "dequantized":
        require_bitsandbytes()
        dtype = DTYPES[reader.checkpoint.manifest["precision"]]
        kind = config.peft.quantization
        as_trained = partial(as_quantized, quantized_weights(model), kind, dtype)
    left_out = find_aliases(model_config, auto)
    if base:
        left_out |= superseded_names(model, base, shapes)
    if auto is SCALAR:  # the base's output embedding
        left_out |= outline(model_config).state_dict().keys() - model.state_dict().keys()
    return Weights(
        shapes,
        reader.read_whole,
        base,
        run_adapter(run_dir),
        left_out,
        transposed_weights(model),
        as_trained,
        None if config.model.path else initial_buffers(model_config, auto),
    )
