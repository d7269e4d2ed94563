"""Which parameters are trained: all, some by name or layer, or low-rank adapters."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config import PeftConfig, nearest
from trainer.errors import ConfigError
from trainer.models.adapter_files import (
    ADAPTED,
    NAME,
    AdapterFiles,
    file_name,
    keep_base,
    write_adapter_config,
)
from trainer.models.families import ALL_LINEAR, lora_targets
from trainer.models.filling import Fill, fill_plain
from trainer.models.scalar_model import HEAD

if TYPE_CHECKING:  # peft costs 0.3 s, which only adapters pay
    from peft import PeftModel

LOG = logging.getLogger(__name__)
B_MATRICES = ".lora_B."  # in the names of the parameters that LoRA+ trains faster


def apply_peft(
    model: PreTrainedModel, peft: PeftConfig, base: str | None = None, fill: Fill = fill_plain
) -> PreTrainedModel | PeftModel:
    """Set ``requires_grad`` (and add adapters) as the peft group says.

    Args:
        model: the base, perhaps quantised, perhaps split by ZeRO-3.
        peft: the peft group.
        base: the folder of the base; an adapter to continue must have been trained on it.
        fill: sets a parameter of the model, when it is split.

    Raises:
        ConfigError: when nothing would be trained, or an adapter does not fit.
    """
    if peft.mode == "full":
        return model
    if peft.mode == "freeze":
        _freeze_all_but(model, peft)
        if (head := score_head(model)) is not None:
            head.requires_grad_(True)
        return model
    # peft imports bitsandbytes where it is installed, which then warns of optional kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model

    files = AdapterFiles.open(peft.adapter) if peft.adapter else None
    if files:
        files.check_base(Path(str(base)))
        settings = LoraConfig.from_pretrained(peft.adapter)
        settings.inference_mode, settings.lora_dropout = False, peft.dropout
    else:
        settings = LoraConfig(
            r=peft.rank,
            lora_alpha=peft.alpha,
            lora_dropout=peft.dropout,
            target_modules=find_targets(model, peft.target_modules),
            use_rslora=peft.rslora,
            use_dora=peft.dora,
            task_type="CAUSAL_LM",
        )
    head = score_head(model)
    if head is not None:
        # peft's own way for classifiers trains a copy of the head, which ZeRO-3 cannot split.
        settings.task_type, settings.modules_to_save = None, None
        targets = settings.target_modules or ()
        settings.exclude_modules = HEAD if targets == ALL_LINEAR or HEAD in targets else None
    settings.base_model_name_or_path = base
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = [end.weight for end in ends if end is not None]
    # One dtype for all trained parameters; the fp32 masters are DeepSpeed's.
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for weight in embeddings if peft.train_embeddings else []:
        # peft's modules_to_save would copy each matrix and so untie tied ones.
        weight.requires_grad_(True)
    if head is not None:
        head.requires_grad_(True)
    if files:
        _load(adapted, files, fill)
    return adapted


def add_adapter(
    adapted: PeftModel, peft: PeftConfig, name: str, *, trained: bool, fill: Fill = fill_plain
) -> None:
    """Give a model a second adapter like its first, which stays on.

    Args:
        adapted: from ``apply_peft``.
        peft: the same peft group; both start from the adapter it names, or new.
        name: of the second adapter.
        trained: whether it is trained, too.
        fill: sets a parameter of the model, when it is split.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    wanted = {param for param in adapted.parameters() if param.requires_grad}
    settings = copy.deepcopy(adapted.peft_config[NAME])
    adapted.add_adapter(name, settings, autocast_adapter_dtype=False)
    for full, param in adapted.named_parameters():
        # peft leaves only the adapter that is on trainable.
        own = f".{name}." in full and ".lora_" in full
        param.requires_grad_(trained if own else param in wanted)
    if peft.adapter:
        _load(adapted, AdapterFiles.open(peft.adapter), fill, name)


def score_head(model: nn.Module) -> nn.Module | None:
    """Return the head of a sequence classifier, which is always trained; None for other models."""
    return dict(model.named_children()).get(HEAD)


def keep_adapter_config(adapted: PeftModel, folder: Path, base: str) -> None:
    """Write what exports of the run need, the adapters' settings and base, into the run.

    Raises:
        ConfigError: the base is another one than when the run began.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep_base(folder, base)
    plain = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in adapted.peft_config[NAME].to_dict().items()
    }
    if score_head(adapted.get_base_model()) is not None:
        plain |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD], "exclude_modules": None}
    write_adapter_config(folder, plain)


def _load(adapted: PeftModel, files: AdapterFiles, fill: Fill, name: str = NAME) -> None:
    """Start one adapter, and what is trained beside it, from the weights of a file.

    Raises:
        ConfigError: they are not exactly those of the adapter.
    """
    named = dict(adapted.named_parameters())
    own = {n: p for n, p in named.items() if ".lora_" in n and f".{name}." in n}
    if name == NAME:
        own |= {n: p for n, p in named.items() if p.requires_grad}
    params = {file_name(n, name): p for n, p in own.items()}
    every = {file_name(n, name) for n, _ in adapted.named_parameters(remove_duplicate=False)}
    second_names = every - {file_name(n, name) for n in named}
    if files.config.get("task_type") != "SEQ_CLS":  # of a language model: the head stays new
        params.pop(f"{ADAPTED}{HEAD}.weight", None)
    missing = sorted(params.keys() - files.shapes.keys())
    extra = sorted(files.shapes.keys() - params.keys() - second_names)
    if missing or extra:
        raise ConfigError(_describe_misfit(files, missing, extra))
    for name, param in params.items():
        shape = list(vars(param).get("ds_shape", param.shape))
        if files.shapes[name] != shape:
            raise ConfigError(
                f"peft.adapter={files.folder}: {name} has shape {files.shapes[name]}, the model "
                f"needs {shape}"
            )
        place = fill if "ds_id" in vars(param) else fill_plain
        place(param, partial(files.read, name))
    config = adapted.peft_config[NAME]
    LOG.info("continuing the adapter %s: rank %d", files.folder, config.r)


def _describe_misfit(files: AdapterFiles, missing: list[str], extra: list[str]) -> str:
    """Say which of an adapter's weights have no place, or which are not there, and the remedy."""
    start = f"peft.adapter={files.folder} "
    whole = [name for name in extra if ".lora_" not in name]
    if whole and not missing:
        return (
            f"{start}also holds {', '.join(whole[:3])}; where these are the vocabulary matrices, "
            "set peft.train_embeddings=true; else merge the adapter and start from that model"
        )
    if missing and all(".lora_" not in name for name in missing):
        return (
            f"{start}holds no {', '.join(missing[:3])}, which peft.train_embeddings=true trains; "
            "set it to false"
        )
    return (
        f"{start}does not fit this model: {len(missing)} weights are missing {missing[:3]}, "
        f"{len(extra)} have no place {extra[:3]}"
    )


def find_targets(model: PreTrainedModel, asked: list[str] | str) -> list[str] | str:
    """Return what peft is to adapt.

    Args:
        model: the base.
        asked: ``auto`` (the family's attention and MLP layers), ``all-linear``, or module names as
            peft reads them: the last part of a module's name, or more of it.

    Raises:
        ConfigError: a module that does not exist or is no linear layer, with the nearest names.
    """
    modules = dict(model.named_modules())
    ends = [id(model.get_input_embeddings()), id(model.get_output_embeddings())]
    linear = {
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in ends
    }
    if asked == "auto":
        known = lora_targets(model.config.to_dict())
        if known == ALL_LINEAR:
            LOG.warning(
                "model_type=%s is not among the known families: LoRA adapts every linear layer; "
                "name others with peft.target_modules",
                model.config.model_type,
            )
            return ALL_LINEAR
        return [name for name in known if _ending_with(linear, name)]
    if isinstance(asked, str):
        return asked
    for target in asked:
        if not _ending_with(linear, target):
            raise ConfigError(_describe_bad_target(target, modules, linear))
    return asked


def _ending_with(names: Iterable[str], end: str) -> list[str]:
    return [name for name in names if name == end or name.endswith(f".{end}")]


def _describe_bad_target(target: str, modules: dict[str, nn.Module], linear: set[str]) -> str:
    start = f"peft.target_modules: {target!r} "
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    among = f"; linear layers here: {', '.join(leaves)}"
    if _ending_with(modules, target):
        whole = "; to train the vocabulary matrices set peft.train_embeddings=true"
        return f"{start}is no linear layer inside the model{whole}{among}"
    return f"{start}is no module of this model{nearest(target, leaves)}{among}"


def _freeze_all_but(model: PreTrainedModel, peft: PeftConfig) -> None:
    """Train what the regex matches, and the last layers."""
    pattern = peft.trainable
    try:
        regex = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"peft.trainable={pattern!r} is no valid regex: {error}") from error
    names = [name for name, _ in model.named_parameters()]
    if regex and not any(regex.search(name) for name in names):
        raise ConfigError(
            f"peft.trainable={pattern!r} matches no parameter; names look like "
            f"{', '.join(names[:2] + names[-1:])}"
        )
    last = _last_layers(model, peft.trainable_layers)
    for name, param in model.named_parameters():
        param.requires_grad_(bool(regex and regex.search(name)) or name.startswith(last))


def _last_layers(model: PreTrainedModel, num_layers: int) -> tuple[str, ...]:
    """Return what the names of the last layers' parameters start with."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if num_layers > count or not stacks:
        raise ConfigError(
            f"peft.trainable_layers={num_layers}: the model has {count} layers; use {count} or "
            "fewer, or peft=full"
        )
    stack = min(stacks, key=len)  # the outermost
    return tuple(f"{stack}.{number}." for number in range(count - num_layers, count))


def learning_rate_factors(peft: PeftConfig) -> dict[str, float]:
    """Return factors of the learning rate by a part of the parameters' names.

    LoRA+ (arXiv:2402.12354) trains the B matrices with a higher rate than the A matrices.
    """
    return {B_MATRICES: peft.b_lr_ratio} if peft.mode in ("lora", "qlora") else {}
