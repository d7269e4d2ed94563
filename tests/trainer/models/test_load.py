"""Initial weights are equal under every ZeRO stage, and ZeRO-3 loads without a full copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from launch.rendezvous import free_port
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.load import load_model, make_config, measure, read_architecture

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# Anonymous memory of one rank while it loads in bf16, above what its imports took. (Pages of
# mapped files are the kernel's to drop; ru_maxrss would start at the parent's.)
MEASURE = """
import json, re, sys, threading, time
import torch
from trainer.config import EngineConfig, ModelConfig
from trainer.engine.ds_config import ModelSize, make_ds_config
from trainer.engine.engine import init_distributed, partitioning
from trainer.models.load import load_model, make_config, measure
def anonymous_bytes():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) * 1024
stage, folder = int(sys.argv[1]), sys.argv[2]
init_distributed(0, 120)
group = ModelConfig("large", path=folder)
config = make_config(group, 0, {})
size = ModelSize(*measure(config))
ds = make_ds_config(EngineConfig(zero_stage=stage), precision="bf16", micro_batch_size=1,
                    grad_accum_steps=1, grad_clip=1.0, size=size,
                    world_size=torch.distributed.get_world_size(), on_cuda=False)
before = peak = anonymous_bytes()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(group, config, torch.bfloat16, 0, partitioning(ds))
running = False
watcher.join()
print(json.dumps({"peak_bytes": peak - before, "model_bytes": size.num_params * 2}))
"""


def peak_share(stage: int, folder: Path) -> float:
    """Return the largest rank's peak memory over the model's size, on two ranks."""
    port = str(free_port())
    ranks = []
    for rank in range(2):
        environ = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", MEASURE, str(stage), str(folder)]
        ranks.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    shares = []
    for process in ranks:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        figures = json.loads(output.splitlines()[-1])
        shares.append(figures["peak_bytes"] / figures["model_bytes"])
    return max(shares)


@pytest.mark.slow
def test_zero3_never_holds_a_full_copy(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=2000,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="50MB")
    assert peak_share(2, tmp_path) > 0.95
    assert peak_share(3, tmp_path) < 0.9  # half is the rank's own share, the rest buffers


def test_architecture_or_path_but_not_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        read_architecture(ModelConfig("none"))
    with pytest.raises(ConfigError, match="exactly one"):
        read_architecture(ModelConfig("both", path=str(tmp_path), architecture=TINY))
    with pytest.raises(ConfigError, match=r"is no model folder.*config\.json"):
        read_architecture(ModelConfig("empty", path=str(tmp_path)))


def test_rows_are_padded_to_a_multiple() -> None:
    config = make_config(ModelConfig("tiny", architecture=TINY, pad_vocab_to=64), 700, {})
    assert config.vocab_size == 704
    num_params, largest = measure(config)
    assert largest == 704 * 32
    model = load_model(ModelConfig("tiny", architecture=TINY), config, torch.float32, 0)
    assert num_params == sum(p.numel() for p in model.parameters())


def test_seed_decides_the_initial_weights() -> None:
    group = ModelConfig("tiny", architecture=TINY)
    config = make_config(group, 700, {})
    weights = [
        load_model(group, config, torch.float32, seed).lm_head.weight.detach() for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.05)
