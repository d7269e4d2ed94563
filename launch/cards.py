"""The README.md of an exported model or adapter: where it comes from and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import PeftConfig, RunConfig

if TYPE_CHECKING:
    from trainer.engine.committed import Checkpoint

CLASSES = {"reward": "AutoModelForSequenceClassification"}  # by stage; others are language models


def write_card(
    config: RunConfig, run_dir: Path, checkpoint: Checkpoint, folder: Path, facts: dict[str, Any]
) -> None:
    """Write README.md.

    Args:
        config: of the run.
        run_dir: its folder.
        checkpoint: what was exported.
        folder: where the card goes.
        facts: ``num_params, precision, num_padding, is_adapter`` of the export.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from trainer.metrics.journal import read_journal
    from trainer.models.adapter_files import run_adapter
    from trainer.models.identity import published_name

    journal = list(read_journal(run_dir / "metrics.jsonl"))
    journal = [record for record in journal if record["step"] <= checkpoint.step]
    evaluations = [record for record in journal if record["split"] == "eval"]
    epochs = [record["epochs"] for record in journal if record.get("event") == "mixture"]
    published = published_name(config.model.path) if config.model.path else None
    templates = Environment(
        loader=PackageLoader("launch", "."), undefined=StrictUndefined, trim_blocks=True
    )
    card = templates.get_template("model_card.md.j2").render(
        config=config,
        facts=facts,
        step=checkpoint.step,
        tokens=checkpoint.state["tokens"],
        num_ranks=checkpoint.manifest["world_size"],
        zero_stage=checkpoint.manifest["zero_stage"],
        sources=describe_sources(config, checkpoint.state, epochs[-1] if epochs else {}),
        published=published,
        base=published or folder_name(config.model.path),
        tuning=describe_tuning(config.peft, run_adapter(run_dir)),
        template=None if config.data.content == "documents" else config.data.template,
        auto_class=CLASSES.get(str(config.stage["name"]), "AutoModelForCausalLM"),
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if evaluations else None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def folder_name(path: str | None) -> str | None:
    """Return a local model's name: that of its folder, and of the one above."""
    return "/".join(Path(path).absolute().parts[-2:]) if path else None


def describe_tuning(peft: PeftConfig, adapter: dict[str, Any] | None) -> str:
    """Return in words which parameters were trained."""
    if peft.mode == "full":
        return "every parameter was trained"
    if peft.mode == "freeze":
        last = f"the last {peft.trainable_layers} layers" if peft.trainable_layers else ""
        named = f"parameters matching `{peft.trainable}`" if peft.trainable else ""
        return f"trained were only {' and '.join(filter(None, (last, named)))}"
    adapter = adapter or {}
    kind = "DoRA" if adapter.get("use_dora") else "LoRA"
    kind = f"rank-stabilised {kind}" if adapter.get("use_rslora") else kind
    targets = adapter.get("target_modules") or []
    where = targets if isinstance(targets, str) else ", ".join(targets)
    words = f"{kind} of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}, on {where}"
    if peft.b_lr_ratio != 1.0:
        words += f", B matrices at {peft.b_lr_ratio:g} times the learning rate"
    if peft.train_embeddings:
        words += ", and both vocabulary matrices"
    if peft.mode == "qlora":
        words += f", on the base quantised to {peft.quantization}"
    return words + (", continued from an earlier adapter" if peft.adapter else "")


def describe_sources(
    config: RunConfig, state: dict[str, Any], epochs: dict[str, float]
) -> list[dict[str, Any]]:
    """Return each source's share of the rows, its size if its store is there, and its epochs."""
    from trainer.data.prepared.store import MANIFEST, read_manifest

    total: Any = sum(source.weight for source in config.data.sources.values()) or 1.0
    rows = []
    for name, source in config.data.sources.items():
        store = Path(config.data.store_dir) / str(state["inputs"].get(f"data.sources.{name}"))
        manifest = read_manifest(store) if (store / MANIFEST).is_file() else {}
        rows.append(
            {
                "name": name,
                "share": source.weight / total,
                "format": source.format,
                "num_documents": manifest.get("num_documents"),
                "epochs": epochs.get(name),
            }
        )
    return rows
