"""Adapters on disk, in peft's own format, and the base they belong to."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizer.load import MANIFEST_NAME, safetensors_header
from trainer.errors import ConfigError
from trainer.models.identity import model_identity, published_name
from trainer.models.shards import open_tensors

LOG = logging.getLogger(__name__)
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT = "kuroshio-adapter-1"
FOLDER = "adapter"  # of a run: the settings of its adapters, in peft's format
BASE_NAME = "base.json"  # there: name and identity of the base
NAME = "default"  # peft's name of a model's first adapter, in parameter names only
ADAPTED = "base_model.model."  # what peft puts before the names of the model it wraps


def file_name(parameter: str, adapter: str = NAME) -> str:
    """Return the name that peft's files give to a parameter of an adapted model."""
    name = parameter.replace(f".lora_magnitude_vector.{adapter}.weight", ".lora_magnitude_vector")
    return name.replace(f".{adapter}.", ".") if ".lora_" in name else name


@dataclass(frozen=True)
class AdapterFiles:
    """A folder with an adapter: ours, or any that peft wrote."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json
    shapes: dict[str, list[int]]  # by the names of the file

    @classmethod
    def open(cls, folder: str | Path) -> AdapterFiles:
        """Read what the folder says about itself.

        Raises:
            ConfigError: no adapter there, or one of a kind that cannot be continued.
        """
        folder = Path(folder)
        config = read_adapter_config(folder)
        if not (folder / WEIGHTS_NAME).is_file():
            raise ConfigError(f"peft.adapter={folder} holds no {WEIGHTS_NAME}; save it again")
        header = safetensors_header(folder / WEIGHTS_NAME)
        return cls(folder, config, {name: entry["shape"] for name, entry in header.items()})

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the file."""
        with open_tensors(self.folder / WEIGHTS_NAME) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def check_base(self, base: Path) -> None:
        """Refuse a base that the adapter was not trained on.

        Adapters of ours know their base by a hash. Of others only shapes and the base's name can
        be compared; another name is a warning.

        Raises:
            ConfigError: another base.
        """
        self._compare_shapes(base)
        manifest = self.folder / MANIFEST_NAME
        known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        if known.get("format") == FORMAT:
            if known["base"]["identity"] != model_identity(base):
                raise ConfigError(
                    f"the adapter {self.folder} was trained on {known['base']['name']} (identity "
                    f"{known['base']['identity'][:12]}), not on model.path={base} (identity "
                    f"{model_identity(base)[:12]}): give the very base, in the same precision"
                )
            return
        named = str(self.config.get("base_model_name_or_path") or "")
        if Path(named).name not in (base.name, (published_name(str(base)) or "").split("/")[-1]):
            LOG.warning(
                "the adapter %s names %r as its base; whether model.path=%s is the same cannot be "
                "known (the shapes fit)",
                self.folder,
                named,
                base,
            )

    def _compare_shapes(self, base: Path) -> None:
        """Compare each pair of low-rank matrices, [rank, in] and [out, rank], with the weight."""
        shapes: dict[str, list[int]] = {}
        for path in sorted(base.glob("*.safetensors")):
            shapes |= {name: entry["shape"] for name, entry in safetensors_header(path).items()}
        for name, down in self.shapes.items():
            if not name.endswith(".lora_A.weight"):
                continue
            up = self.shapes.get(name.replace(".lora_A.", ".lora_B."), [0])
            weight = name.removeprefix(ADAPTED).replace(".lora_A.", ".")
            if weight in shapes and sorted(shapes[weight]) != sorted([up[0], down[-1]]):
                raise ConfigError(
                    f"the adapter {self.folder} does not fit model.path={base}: {weight} is "
                    f"{shapes[weight]} there, the adapter's is {[up[0], down[-1]]}"
                )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of a folder.

    Raises:
        ConfigError: missing, unreadable, or of a kind that is not merged and continued here.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} is no adapter folder: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ConfigError(
            f"the adapter {folder} is of type {kind}; only LoRA (also rsLoRA "
            "and DoRA) can be continued and merged"
        )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ConfigError(
            f"the adapter {folder} trains biases (bias={config.get('bias')}), which is not "
            "supported; merge it with peft's merge_and_unload and start from the merged model"
        )
    return config


def keep_base(folder: Path, base: str) -> dict[str, str]:
    """Note in a run's adapter folder which base it is trained on, or find the same one noted.

    Returns and raises what ``known_base`` does.
    """
    path = folder / BASE_NAME
    if not path.is_file():
        noted = json.dumps(describe_base(base), indent=2, ensure_ascii=False)
        path.write_text(noted + "\n", encoding="utf-8")
    return known_base(folder.parent, base)


def known_base(run_dir: Path, base: str) -> dict[str, str]:
    """Return name and identity of the base of a run's adapters, which ``base`` still has to hold.

    Raises:
        ConfigError: the weights in ``base`` are not those that the run began with.
    """
    now = describe_base(base)
    before = noted_base(run_dir) or now
    if before["identity"] != now["identity"]:
        raise ConfigError(
            f"model.path={base} has changed since the run {run_dir} began on it (identity "
            f"{before['identity'][:12]} then, {now['identity'][:12]} now): its adapter belongs to "
            "the old weights; bring them back"
        )
    return before


def run_adapter(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of a run's adapters, None for a run without."""
    folder = run_dir / FOLDER
    return read_adapter_config(folder) if folder.is_dir() else None


def noted_base(run_dir: Path) -> dict[str, str] | None:
    """Return name and identity of the base that a run's adapters are trained on, if noted."""
    path = run_dir / FOLDER / BASE_NAME
    if not path.is_file():
        return None
    noted: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return noted


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """Return what an adapter's product is multiplied by.

    alpha / rank (arXiv:2106.09685), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).

    Args:
        config: ``adapter_config.json``.
        module: the adapted module, whose own rank and alpha may differ.
    """
    rank = _of_module(config.get("rank_pattern"), module, config["r"])
    alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_module(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with."""
    found = (p for p in patterns or {} if re.fullmatch(rf"(.*\.)?({p})", module))
    return next(((patterns or {})[pattern] for pattern in found), otherwise)


def write_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json``."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def describe_base(base: str) -> dict[str, str]:
    """Return name and identity of a base model, for ``kuroshio.json`` beside an adapter."""
    return {"name": published_name(base) or base, "identity": model_identity(Path(base))}
