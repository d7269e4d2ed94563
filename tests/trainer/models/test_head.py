"""The fused head inside transformers models: loss, gradients, tying, peft and ZeRO."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trainer.errors import ConfigError
from trainer.losses.cross_entropy import IGNORE_INDEX, cross_entropy_sum, next_token_targets
from trainer.models.head import (
    FusedHead,
    causal_lm_logps,
    causal_lm_loss,
    install_fused_head,
    supports_fused_head,
)

VOCAB = 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def make_batch(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows; the first packs two documents, whose second one starts at position 7."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, vocab, (2, 12), generator=generator)
    position_ids = torch.arange(12).repeat(2, 1)
    position_ids[0, 7:] = torch.arange(5)
    labels = input_ids.clone()
    labels[0, 7] = IGNORE_INDEX
    labels[1, 9:] = IGNORE_INDEX
    return input_ids, position_ids, labels


def plain_loss(model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return cross_entropy_sum(logits, next_token_targets(labels))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_equal_the_plain_model(tied: bool) -> None:
    model, plain = make_model(tied), make_model(tied)
    install_fused_head(model)
    loss, expected = causal_lm_loss(model, *make_batch()), plain_loss(plain, *make_batch())
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert len(grads) == len(list(plain.parameters()))


def test_the_shift_is_transformers_own() -> None:
    """The mean over shifted labels is what transformers computes from the same labels."""
    model = make_model(tied=False)
    input_ids, position_ids, labels = make_batch()
    expected = model(
        input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False
    ).loss
    install_fused_head(model)
    num_targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    loss = causal_lm_loss(model, input_ids, position_ids, labels) / num_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_packed_documents_do_not_see_each_other() -> None:
    model = make_model(tied=False)
    install_fused_head(model)
    input_ids, position_ids, labels = make_batch()
    labels[:, :7], labels[1] = IGNORE_INDEX, IGNORE_INDEX  # only the second document counts
    changed = input_ids.clone()
    changed[0, :7] = 5
    loss = causal_lm_loss(model, input_ids, position_ids, labels)
    other = causal_lm_loss(model, changed, position_ids, labels)
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    leaking = causal_lm_loss(model, changed, torch.arange(12).repeat(2, 1), labels)
    assert leaking.item() != pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_installing_changes_neither_parameters_names_nor_logits(tied: bool, tmp_path: Path) -> None:
    model = make_model(tied)
    input_ids, *_ = make_batch()
    names, logits = list(model.state_dict()), model(input_ids).logits
    weight = model.lm_head.weight
    install_fused_head(model)
    assert isinstance(model.lm_head, FusedHead) and model.lm_head.weight is weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.tie_word_embeddings is tied
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids).logits, logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(input_ids).logits, logits)


def test_generation_gives_the_same_tokens() -> None:
    model = make_model(tied=False)
    prompt = make_batch()[0][:, :4]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    install_fused_head(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_padded_rows_are_left_out_of_the_loss() -> None:
    model, plain = make_model(tied=False), make_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight[90:] *= 1000
    plain.lm_head = nn.Linear(32, 90, bias=False)
    plain.lm_head.weight = nn.Parameter(model.lm_head.weight[:90].detach().clone())
    install_fused_head(model, num_real_rows=90)
    batch = make_batch(vocab=90)
    loss = causal_lm_loss(model, *batch)
    loss.backward()
    assert loss.item() == pytest.approx(plain_loss(plain, *batch).item(), rel=1e-6)
    assert not model.lm_head.weight.grad[90:].any()


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_real_rows=97.* 96 rows"):
        install_fused_head(make_model(tied=False), num_real_rows=97)


def make_family(family: str, **extra: object) -> nn.Module:
    config = AutoConfig.for_model(family, **{**SIZES, **extra})
    return AutoModelForCausalLM.from_config(config).eval()  # without router loss


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "mixtral", "olmo2", "gpt_neox"])
def test_families_with_plain_logits_are_fused(family: str) -> None:
    model = make_family(family)
    expected = plain_loss(model, *make_batch()).item()
    install_fused_head(model)
    assert causal_lm_loss(model, *make_batch()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gemma2", {"head_dim": 8}),  # soft cap
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {}),  # logit_scale
        ("phi", {}),  # bias
    ],
)
def test_families_that_change_their_logits_keep_their_head(family: str, extra: dict) -> None:
    model = make_family(family, **extra)
    assert not supports_fused_head(model)
    with pytest.raises(ConfigError, match="logits"):
        install_fused_head(model)
    expected = plain_loss(model, *make_batch()).item()
    assert causal_lm_loss(model, *make_batch()).item() == pytest.approx(expected, rel=1e-6)


def test_a_bias_is_refused() -> None:
    with pytest.raises(ConfigError, match="bias"):
        FusedHead.adopt(nn.Linear(4, 8), 8)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora_models_give_their_own_loss(targets: list[str]) -> None:
    """With an adapter on the head itself the loss comes from plain logits, adapter included."""
    model = make_model(tied=False)
    install_fused_head(model)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    expected = plain_loss(adapted, *make_batch())
    loss = causal_lm_loss(adapted, *make_batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trainable)
    for grad, other in zip(grads, torch.autograd.grad(expected, trainable), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def zero_gradient_errors(zero_stage: int, tied: bool, output: str) -> dict[str, float]:
    """Return each gradient's largest relative error under DeepSpeed against a plain model."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    class Loss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *batch: Tensor) -> Tensor:
            if output == "logps":
                return -causal_lm_logps(self.model, *batch).sum()
            return causal_lm_loss(self.model, *batch)

    model = make_model(tied)
    plain = copy.deepcopy(model)
    install_fused_head(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=Loss(model), config=config)
    engine.backward(engine(*make_batch()))
    plain_loss(plain, *make_batch()).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return {
        name: ((safe_get_full_grad(p) - expected[name]).norm() / expected[name].norm()).item()
        for name, p in model.named_parameters()
    }


ZERO_CASES = [
    (stage, tied, output)
    for output in ("loss", "logps")
    for stage in (2, 3)
    for tied in (False, True)
]


@pytest.fixture(scope="module")
def zero_errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Run all cases in one process of their own, which DeepSpeed may set up as it likes."""
    result = tmp_path_factory.mktemp("zero") / "errors.json"
    environment = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    command = [sys.executable, __file__, str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("case", range(len(ZERO_CASES)))
def test_gradients_under_zero_equal_the_plain_ones(
    zero_errors: list[dict[str, float]], case: int
) -> None:
    _, tied, _ = ZERO_CASES[case]
    assert len(zero_errors[case]) == len(list(make_model(tied).parameters()))
    assert max(zero_errors[case].values()) < 1e-5, zero_errors[case]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([zero_gradient_errors(*case) for case in ZERO_CASES]))
