"""Every model family on a tiny random model: training, packing, LoRA, sizes, generation, reload.

What is measured here is what docs/models.md says; ``family_table.py`` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import TINY, VOCAB, tiny_config, tiny_model
from family_table import PAGE, Row, measure, packed_rows, page
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.attention import isolated_documents, use_document_attention
from trainer.models.families import (
    ALL_LINEAR,
    FAMILIES,
    find_family,
    isolates_documents,
    lora_targets,
)
from trainer.models.head import FusedHead, install_fused_head, supports_fused_head
from trainer.models.language_model import LanguageModel
from trainer.models.scalar_model import scalar_config
from trainer.plan.flops import ModelShape

every_variant = pytest.mark.parametrize("variant", TINY)
# Layers that no adapter is put on: they decide which expert is used, or weigh it.
ROUTERS = {"router", "shared_expert_gate"}
DENSE = {"gate_proj", "up_proj", "down_proj"}


def make_language_model(variant: str) -> LanguageModel:
    """Build a variant's model as training builds it."""
    model = tiny_model(variant)
    if supports_fused_head(model):
        install_fused_head(model, VOCAB)
    return LanguageModel(model, VOCAB)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {variant: measure(variant) for variant in TINY}


def test_the_page_is_up_to_date(rows: dict[str, Row]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(rows), (
        "docs/models.md differs from what the models do: run `python tests/family_table.py --write`"
    )


@every_variant
def test_packed_scores_are_those_of_plain_transformers(rows: dict[str, Row], variant: str) -> None:
    error = rows[variant].score_error
    if error is None:
        config = tiny_config(variant)
        model = ModelConfig(variant, architecture={"model_type": config.model_type})
        with pytest.raises(ConfigError, match=f"no sequence classifier for .*{config.model_type}"):
            scalar_config(model, VOCAB, {})
    else:
        assert error < 2e-5


@every_variant
def test_log_probabilities_are_those_of_the_logits(variant: str) -> None:
    model = make_language_model(variant).eval()
    input_ids, position_ids, labels = packed_rows()
    labels[:, ::3] = -100
    if not isolates_documents(model.decoder.config.to_dict()):
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    with isolated_documents(model.decoder, position_ids) as mask:
        inputs = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        every = (model.decoder(input_ids=input_ids, **inputs).logits / 0.7).log_softmax(-1)
    chosen, targets = labels[:, 1:] != -100, labels[:, 1:]
    rows = every[:, :-1][chosen]
    logps, entropies = model(
        input_ids, position_ids, labels, output="logps", temperature=0.7, with_entropy=True
    )
    expected = rows.gather(1, targets[chosen][:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies, -(rows.exp() * rows).sum(1), rtol=1e-5, atol=2e-5)


def test_every_family_has_a_model() -> None:
    assert {model_type for model_type, _ in TINY.values()} == set(FAMILIES)


@every_variant
def test_packed_documents_are_apart_exactly_where_the_table_says(
    variant: str, rows: dict[str, Row]
) -> None:
    """A family that leaks must be padded; one that does not must not be called leaking."""
    config = tiny_config(variant).to_dict()
    assert rows[variant].leaks is not isolates_documents(config)
    family = find_family(config)
    assert family is not None
    assert rows[variant].by_document is (family.isolation == "kernel")


@every_variant
def test_packed_documents_have_the_loss_they_have_alone(variant: str) -> None:
    if not isolates_documents(tiny_config(variant).to_dict()):
        pytest.skip("the family is padded")
    model = make_language_model(variant)
    input_ids, position_ids, labels = packed_rows()
    with torch.no_grad():
        packed = model(input_ids=input_ids, position_ids=position_ids, labels=labels)
        alone = torch.zeros(())
        for row, begins in enumerate(position_ids == 0):
            for piece in torch.tensor_split(torch.arange(32), begins.nonzero().flatten()[1:]):
                ids = input_ids[None, row, piece]
                loss = model(input_ids=ids, position_ids=position_ids[None, row, piece], labels=ids)
                alone += loss
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)


@every_variant
def test_the_loss_is_transformers_own(variant: str) -> None:
    """Also for right-padded rows, and with the model's own default of cache and mask."""
    model = make_language_model(variant)
    plain = AutoModelForCausalLM.from_config(tiny_config(variant)).eval()
    plain.load_state_dict(model.decoder.state_dict())
    input_ids, labels = packed_rows()[0], packed_rows()[0].clone()
    input_ids[1, 20:], labels[1, 20:] = 0, -100
    mask = (torch.arange(32) < torch.tensor([[32], [20]])).long()
    with torch.no_grad():
        expected = plain(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        position_ids = torch.arange(32).repeat(2, 1)
        loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels)
    assert loss.item() / (31 + 19) == pytest.approx(expected.item(), rel=1e-5)


def train(model: LanguageModel, weights: Tensor | None, lr: float = 3e-3) -> list[float]:
    """Take five steps on one batch; return the mean loss before each and after the last."""
    input_ids, position_ids, labels = packed_rows()
    if not isolates_documents(model.decoder.config.to_dict()):
        position_ids = torch.arange(32).repeat(2, 1)
    if weights is not None:
        labels = labels.masked_fill(weights == 0, -100)
    count = (labels[:, 1:] != -100).sum() if weights is None else weights[:, 1:].sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    torch.manual_seed(0)  # of dropout
    losses = []
    for _ in range(6):
        loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, weights=weights)
        losses.append(loss.item() / count.item())
        optimizer.zero_grad()
        (loss / count).backward()
        for name, parameter in model.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            assert finite, f"{name} has a gradient that is not finite"
        optimizer.step()
    return losses


def answer_weights() -> Tensor:
    """Weight the second half of every document, half as much in the second row."""
    position_ids = packed_rows()[1]
    return (position_ids > 3).float() * torch.tensor([[1.0], [0.5]])


@every_variant
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_training_steps_lower_the_loss(variant: str, stage: str) -> None:
    model = make_language_model(variant).train()
    losses = train(model, answer_weights() if stage == "sft" else None)
    assert losses[-1] < losses[0] - 0.05
    if stage == "pretrain":
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, f"got no gradient: {idle}"


@every_variant
def test_lora_adapts_every_layer_that_it_names_and_no_other(
    variant: str, rows: dict[str, Row]
) -> None:
    """The default targets are all linear layers but routers; the variant may lack some."""
    targets = lora_targets(tiny_config(variant).to_dict())
    left = rows[variant].linear - ROUTERS - set(targets)
    assert left == (DENSE if variant.startswith("deepseek") else set())
    model = make_language_model(variant).decoder
    present = [name for name in targets if name in rows[variant].linear]
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    reached = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in adapted.named_parameters()
        if ".lora_A" in name
    }
    assert reached == set(present)
    wrapped = LanguageModel(adapted, VOCAB).train()
    losses = train(wrapped, answer_weights(), lr=3e-2)
    assert losses[-1] < losses[0] - 0.05


def test_each_target_occurs_in_some_variant(rows: dict[str, Row]) -> None:
    for family in FAMILIES.values():
        found = {
            name
            for variant, row in rows.items()
            if TINY[variant][0] == family.model_type
            for name in row.linear
        }
        unused = set(family.lora_targets) - found
        # DeepSeek-V2-Lite has no low rank of queries, so q_proj takes the place of two layers.
        assert unused <= {"q_proj"} and (not unused or family.model_type.startswith("deepseek"))


@every_variant
def test_sizes_are_counted_exactly(variant: str) -> None:
    config = tiny_config(variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    assert shape.num_params == sum(p.numel() for p in model.parameters())


@every_variant
def test_a_saved_model_is_a_plain_one(variant: str, tmp_path: Path) -> None:
    """Neither our attention nor our head remains in what transformers reads back."""
    model = make_language_model(variant).decoder
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation in ("sdpa", "eager")
    assert not any(isinstance(module, FusedHead) for module in again.modules())
    input_ids = packed_rows()[0]
    with torch.no_grad():
        expected = model(input_ids=input_ids, use_cache=False).logits
        torch.testing.assert_close(
            again(input_ids=input_ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
        )


@every_variant
def test_continued_text_is_the_plain_model_s(variant: str) -> None:
    """Greedy tokens with our attention in place equal those of repeated whole forwards."""
    model = make_language_model(variant)
    ids = prompt = packed_rows()[0][:1, :9]
    with torch.no_grad():
        for _ in range(5):
            position_ids = torch.arange(ids.shape[1])[None]
            logits = model.decoder(input_ids=ids, position_ids=position_ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    ends = (ids[0, 9:] == 2).nonzero()  # the config's end of text
    length = 9 + (int(ends[0]) + 1 if len(ends) else 5)
    assert torch.equal(model.continue_text(prompt, 5, [2]), ids[:, :length])


def test_a_folder_s_generation_settings_do_not_reach_samples() -> None:
    prompt = packed_rows()[0][:1, :9]
    plain = make_language_model("llama").continue_text(prompt, 12, [2])
    opinionated = tiny_model("llama")
    opinionated.generation_config.repetition_penalty = 5.0
    samples = LanguageModel(opinionated, VOCAB).continue_text(prompt, 12, [2])
    assert torch.equal(samples, plain)


def test_an_unknown_family_is_padded_and_adapted_everywhere() -> None:
    for config in ({"model_type": "xverse"}, {}, {"model_type": "mamba2"}):
        assert find_family(config) is None
        assert not isolates_documents(config)
        assert lora_targets(config) == ALL_LINEAR


@pytest.fixture
def unknown() -> Iterator[Any]:
    """A family that the table does not know, built by transformers."""
    config = AutoConfig.for_model(
        "arcee", hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=VOCAB,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    yield AutoModelForCausalLM.from_config(config).eval()


def test_an_unknown_family_keeps_its_attention_and_trains(unknown: Any) -> None:
    use_document_attention(unknown)
    assert unknown.config._attn_implementation == "sdpa"
    losses = train(LanguageModel(unknown, VOCAB).train(), answer_weights())
    assert losses[-1] < losses[0]


def test_the_cache_and_two_dimensional_masks_join_documents() -> None:
    """Why ``causal_lm_loss`` passes neither: transformers then finds no packed documents."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    input_ids, position_ids, _ = packed_rows()
    changed = input_ids.clone()
    changed[0, :9] = 5

    def moved(**extra: Any) -> float:
        with torch.no_grad():
            one = model(input_ids=input_ids, position_ids=position_ids, **extra).logits
            two = model(input_ids=changed, position_ids=position_ids, **extra).logits
        return float((one - two)[0, 9:].abs().max())

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert moved(use_cache=False) < 1e-6
    assert moved() > 1e-2
    assert moved(use_cache=False, attention_mask=torch.ones_like(input_ids)) > 1e-2
