"""Measure every model family on a tiny random model, and write docs/models.md from it.

python tests/family_table.py --write
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Conv1D, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from family_models import TINY, VOCAB, tiny_config, tiny_model  # noqa: E402

from trainer.models.attention import DOCUMENTS, isolated_documents  # noqa: E402
from trainer.models.families import FAMILIES, REMOTE_FAMILIES, isolates_documents  # noqa: E402
from trainer.models.head import supports_fused_head  # noqa: E402
from trainer.models.router import router_loss_coefficient  # noqa: E402
from trainer.models.scalar_model import ScalarModel, install_score_head  # noqa: E402

PAGE = ROOT / "docs/models.md"
TEMPLATE = Path(__file__).with_suffix(".md")
LENGTHS = ((9, 5, 11, 7), (3, 13, 1, 15))  # of the documents of two packed rows, 32 tokens each
CHANGED = 1  # the document of each row that is replaced

# The names of a well-known course's table, and what to look for in ours.
NAMES = {
    "Baichuan, Baichuan2": "own code, below",
    "BLOOM, BLOOMZ": "`bloom`",
    "ChatGLM3": "own code, below; GLM-4 is `glm` or `glm4`",
    "Falcon": "`falcon`",
    "InternLM": "own code, below; InternLM 3 is `internlm3`",
    "LLaMA, LLaMA-2, LLaMA-3": "`llama`",
    "Mistral": "`mistral`",
    "Mixtral": "`mixtral`",
    "Phi": "`phi`, `phi3`, `phimoe`",
    "Qwen": "`qwen2`, `qwen2_moe`, `qwen3`, `qwen3_moe`; Qwen 1: own code, below",
    "XVERSE": "own code, below",
    "Yi": "`llama`",
    "Yuan": "own code, below",
}


def packed_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, positions and labels ``[2, 32]`` of packed documents."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB, (2, 32), generator=generator)
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS]
    position_ids = torch.stack(rows)
    return input_ids, position_ids, input_ids.masked_fill(position_ids == 0, -100)


@torch.no_grad()
def measure_leak(model: PreTrainedModel) -> float:
    """Return how far a document's change moves the logits of the others in its row."""
    input_ids, position_ids, _ = packed_rows()
    changed, untouched = input_ids.clone(), torch.ones_like(input_ids, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        start = sum(lengths[:CHANGED])
        own = slice(start, start + lengths[CHANGED])
        changed[row, own] = (changed[row, own] + 7) % (VOCAB - 3) + 3
        untouched[row, own] = False
    logits = []
    for ids in (input_ids, changed):
        with isolated_documents(model, position_ids) as mask:
            inputs = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
            logits.append(model(input_ids=ids, **inputs).logits)
    return float((logits[0] - logits[1])[untouched].abs().max())


def tiny_classifier(variant: str) -> PreTrainedModel | None:
    """Return a random one-label classifier of a variant, None where transformers has none."""
    config = tiny_config(variant, num_labels=1)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def measure_scores(variant: str) -> float | None:
    """Return how far our scores of packed documents are from transformers' of each alone.

    Where documents cannot be packed, they are padded. None: there is no such model.
    """
    model = tiny_classifier(variant)
    if model is None:
        return None
    ids, position_ids, _ = packed_rows()
    ends = torch.tensor(LENGTHS).cumsum(1) - 1
    places = [
        (row, int(end), n) for row in (0, 1) for end, n in zip(ends[row], LENGTHS[row], strict=True)
    ]
    alone = [model(ids[r, end - n + 1 : end + 1][None]).logits[0, 0] for r, end, n in places]
    selected = (ends + torch.tensor([[0], [ids.shape[1]]])).flatten()
    if not isolates_documents(model.config.to_dict()):
        width = max(n for _, _, n in places)
        padded = torch.zeros(len(places), width, dtype=torch.long)
        for number, (row, end, n) in enumerate(places):
            padded[number, :n] = ids[row, end - n + 1 : end + 1]
        selected = torch.tensor([number * width + n - 1 for number, (_, _, n) in enumerate(places)])
        ids, position_ids = padded, torch.arange(width).expand_as(padded)
    install_score_head(model)
    scores = ScalarModel(model)(ids, position_ids, selected)
    return float((scores - torch.stack(alone)).abs().max())


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Return the last names of the linear layers inside the decoder's layers."""
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


@dataclass(frozen=True)
class Row:
    """What was measured on one model."""

    leaks: bool
    by_document: bool
    fused: bool
    router: bool
    linear: frozenset[str]
    score_error: float | None


def measure(variant: str) -> Row:
    """Build a variant's model and measure its row."""
    model = tiny_model(variant)
    return Row(
        leaks=measure_leak(model) > 1e-5,
        by_document=model.config._attn_implementation == DOCUMENTS,
        fused=supports_fused_head(copy.deepcopy(model)),
        router=router_loss_coefficient(model.config) > 0,
        linear=frozenset(linear_layers(model)),
        score_error=measure_scores(variant),
    )


def describe(model_type: str, rows: list[Row]) -> str:
    """Return a family's line of the table; where its variants differ, all ways are named."""

    def either(words: list[str]) -> str:
        return " / ".join(dict.fromkeys(words))

    family = FAMILIES[model_type]
    packed = either(
        ["no: padded" if r.leaks else "by document" if r.by_document else "row mask" for r in rows]
    )
    loss = either(["fused" if row.fused else "plain" for row in rows])
    router = " + router" if rows[0].router else ""
    targets = " ".join(t for t in family.lora_targets if any(t in row.linear for row in rows))
    reward = "no" if rows[0].score_error is None else "yes"
    name = f"`{model_type}`"
    cells = [name, family.models, packed, loss + router, reward, targets, family.remark]
    return "| " + " | ".join(cells) + " |"


def page(rows: dict[str, Row]) -> str:
    """Return docs/models.md from the measured rows by variant."""
    by_type: dict[str, list[Row]] = {}
    for variant, row in rows.items():
        by_type.setdefault(TINY[variant][0], []).append(row)
    table = "\n".join(describe(model_type, found) for model_type, found in by_type.items())
    remote = "\n".join(
        f"| {family.models} | {family.llama or 'no native equal'} |" for family in REMOTE_FAMILIES
    )
    names = "\n".join(f"| {name} | {found} |" for name, found in NAMES.items())
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.format(table=table, remote=remote, names=names, num_rows=len(rows))


if __name__ == "__main__":
    text = page({variant: measure(variant) for variant in TINY})
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
