"""Every training stage goes on alike on other ranks, ZeRO stages and offload."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from life_schedules import make_life, read_rows
from training_fixtures import varying, write_mixture
from training_support import ROOT, largest_difference, read_masters, run_chains

pytestmark = [pytest.mark.slow, pytest.mark.faults(row=12), pytest.mark.faults(row=14)]

MAX_STEPS = 6
Changes = dict[str, Any]
Vary = Callable[..., dict[str, Any]]
CPU: Changes = {"engine__offload_optimizer": "cpu"}
CPU_ALL: Changes = CPU | {"engine__offload_params": "cpu"}
# Three lives each: ranks, ZeRO stage, what else changes. The first two are killed in a step.
UP_AND_DOWN = [(1, 1, {}), (4, 3, {}), (2, 2, {})]
DOWN_AND_UP = [(4, 2, {}), (1, 0, {}), (2, 3, {})]
HALVED = [(4, 3, {}), (2, 1, {}), (1, 2, {})]
OFFLOADED = [(2, 2, CPU), (4, 3, CPU_ALL), (1, 1, {})]
LORA: Changes = {"mode": "lora", "rank": 4, "alpha": 8.0}
PPO = {
    "name": "ppo",
    "rewards": {"contains": {"texts": ["a", "the"]}},
    "rollouts_per_step": 8,
    "sampling": {"max_new_tokens": 10},
    "update": {"epochs": 2, "num_minibatches": 2, "entropy_coef": 0.01},
    "kl": {"coef": 0.1, "target": 2.0, "horizon": 20},
    "score": {"scale": True, "clip": 3.0},
}
FIGURES = (
    "loss", "accuracy", "margin", "grad_norm", "reward", "kl", "kl_coef", "policy_loss",
    "value_loss", "entropy", "response_length", "tokens", "epoch", "loss_scale",
    "num_overflows",
)  # fmt: skip


@pytest.fixture(scope="module")
def split_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Vary]:
    """Return a function that makes two weighted sources of a config's one, and prepares them."""

    def split(base: dict[str, Any], **changes: Any) -> Vary:
        folder, values = tmp_path_factory.mktemp("mixture"), copy.deepcopy(base) | changes
        [path] = [p for source in values["data"]["sources"].values() for p in source["paths"]]
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        write_mixture(values, folder, {"few": (lines[:12], 3.0), "many": (lines[12:90], 1.0)})
        return varying(values)

    return split


class Runs:
    """Gathers runs, each unbroken and in three lives, and starts them all together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tolerances = folder, dict[str, float]()
        self.chains: list[list[dict[str, Any]]] = []

    def add(
        self,
        name: str,
        vary: Vary,
        lives: list[tuple[int, int, Changes]],
        tolerance: float = 1e-5,
        **changes: Any,
    ) -> None:
        peft, is_ppo = changes.pop("peft", None), name.startswith("ppo")

        def config(run_dir: Path, zero_stage: int, more: Changes) -> dict[str, Any]:
            loop = {
                "loop__max_steps": MAX_STEPS,
                "loop__save_every": 1,
                "loop__micro_batch_size": 1,
            }
            values = vary(run_dir, **loop | changes | more, engine__zero_stage=zero_stage)
            return values | ({"peft": peft} if peft else {})

        ends = [("kill", 2), ("kill", 4), ("finish", MAX_STEPS)]
        twists: list[Changes] = [{}, {}, {}]
        if is_ppo:
            twists = [{"kill_in": "generate"}, {"kill_in": "backward"}, {}]
        whole, parts = self.folder / f"{name}_unbroken", self.folder / f"{name}_lives"
        self.tolerances[name] = tolerance
        self.chains.append([make_life(config(whole, 1, {}), 1)])
        self.chains.append(
            [
                make_life(config(parts, stage, more), ranks, *end, **twist)
                for (ranks, stage, more), end, twist in zip(lives, ends, twists, strict=True)
            ]
        )

    def run(self) -> None:
        problems = run_chains(self.chains, self.folder)
        assert not problems, "\n".join(problems)

    def compare(self) -> None:
        """Compare what steps read, figures, weights and the state of every run's last step."""
        for name, tolerance in self.tolerances.items():
            whole, parts = self.folder / f"{name}_unbroken", self.folder / f"{name}_lives"
            first = read_rows(whole)
            assert sum(map(len, first.values())) >= MAX_STEPS * 4, name
            assert read_rows(parts) == first, name
            curves = [read_figures(run) for run in (whole, parts)]
            assert curves[0].keys() == curves[1].keys()
            gaps = {k: abs(v - curves[1][k]) / max(1.0, abs(v)) for k, v in curves[0].items()}
            furthest = max(gaps, key=lambda key: gaps[key])
            assert gaps[furthest] < tolerance, (name, furthest, gaps[furthest])
            # Adam makes steps of the learning rate's size (1e-3) of the smallest gradients.
            gap = largest_difference(read_masters(whole), read_masters(parts))
            assert gap < 10 * tolerance, (name, gap)
            assert read_state(parts) == read_state(whole), name
            resumes = [r["step"] for r in read_records(parts) if r.get("event") == "resume"]
            assert len(resumes) == 2 and resumes[0] > 0, (name, resumes)
            print(f"{name}: {furthest} {gaps[furthest]:.2g} apart, resumed at {resumes}")


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_figures(run_dir: Path) -> dict[tuple[int, str], float]:
    """Return a run's figures by step and name."""
    steps = [record for record in read_records(run_dir) if record["split"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, MAX_STEPS + 1))
    return {(r["step"], key): r[key] for r in steps for key in FIGURES if key in r}


def read_state(run_dir: Path) -> Any:
    """Return what the last checkpoint resumes from besides tensors, rounded."""
    path = run_dir / f"checkpoints/step_{MAX_STEPS:08d}/manifest.json"
    state = json.loads(path.read_text())["state"]
    del state["seconds"]
    return json.loads(json.dumps(state), parse_float=lambda text: round(float(text), 4))


def test_fine_tuning_goes_on_elsewhere(
    chat_config: dict[str, Any],
    dpo_config: dict[str, Any],
    split_sources: Callable[..., Vary],
    cpu_adam: None,
    tmp_path: Path,
) -> None:
    """All weights with noise on the embeddings; adapters with dropout; on a quantised base."""
    vary, runs = split_sources(chat_config, model=dpo_config["model"]), Runs(tmp_path)
    noise = {"stage__neftune_alpha": 5.0}
    runs.add("noise", vary, [(1, 1, {"loop__micro_batch_size": 4}), *UP_AND_DOWN[1:]], **noise)
    runs.add("dropout", vary, OFFLOADED, peft=LORA | {"dropout": 0.2})
    runs.add("qlora", vary, DOWN_AND_UP, peft=LORA | {"mode": "qlora"}, data__packing=False)
    runs.run()
    runs.compare()


def test_preferences_go_on_elsewhere(
    preference_config: dict[str, Any],
    dpo_config: dict[str, Any],
    split_sources: Callable[..., Vary],
    cpu_adam: None,
    tmp_path: Path,
) -> None:
    """A reward model; DPO and KTO with the reference cached, streaming and as adapter off."""
    runs = Runs(tmp_path)
    runs.add(
        "reward", split_sources(preference_config), UP_AND_DOWN,
        loop__eval_chars=1000, loop__eval_every=2,
    )  # fmt: skip
    vary = split_sources(dpo_config)
    kto = {"name": "kto", "beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    runs.add("cached", vary, HALVED, stage__reference="cached")
    runs.add("kto", vary, DOWN_AND_UP, stage__objective=kto)
    runs.add("streaming", vary, OFFLOADED, stage__reference="streaming")
    runs.add("adapter_off", vary, UP_AND_DOWN, peft=LORA)
    runs.run()
    runs.compare()


def test_rollouts_go_on_elsewhere(
    dpo_config: dict[str, Any],
    split_sources: Callable[..., Vary],
    cpu_adam: None,
    tmp_path: Path,
) -> None:
    """PPO with a backbone each for actor and critic, with a shared one, and GRPO."""
    values, runs = copy.deepcopy(dpo_config), Runs(tmp_path)
    values["data"] |= {"content": "prompts", "max_length": 64}
    values["optim"] |= {"lr": 1e-3, "weight_decay": 0.0}
    vary = split_sources(values, stage=PPO)
    runs.add("ppo_separate", vary, UP_AND_DOWN)
    runs.add("ppo_shared", vary, OFFLOADED, stage__models="shared", peft=LORA)
    runs.add("ppo_qlora", vary, HALVED, peft=LORA | {"mode": "qlora"})
    runs.add(
        "ppo_group", vary, DOWN_AND_UP, stage__advantage="grpo", stage__responses_per_prompt=2,
    )  # fmt: skip
    runs.run()
    runs.compare()


def test_documented_commands_run(english_tokenizer: Path, tmp_path: Path) -> None:
    """Run what docs/reliability.md says; the report then says what the move took."""
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    section = page.partition("\n## Another number of GPUs\n")[2].partition("\n## ")[0]
    [commands] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "TOKENIZER": str(english_tokenizer)}
    done = subprocess.run(
        ["bash", "-euxc", commands],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of=1 rank, ZeRO-2  on=2 ranks, ZeRO-3  gb_read=" in done.stderr
    report = (tmp_path / "runs/moved/report.html").read_text(encoding="utf-8")
    assert "1 rank, ZeRO-2 on 2 ranks, ZeRO-3: " in report
    assert [r["step"] for r in read_records(tmp_path / "runs/moved") if r["split"] == "train"] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_pretraining_goes_on_with_and_without_offload(
    base_config: dict[str, Any],
    split_sources: Callable[..., Vary],
    cpu_adam: None,
    async_io: None,
    tmp_path: Path,
) -> None:
    """From no offload to host memory to files and back; in fp16 with the loss scale it had."""
    vary, runs, nvme = split_sources(base_config), Runs(tmp_path), tmp_path / "nvme"
    nvme.mkdir()
    files = {"offload_optimizer": "nvme", "offload_params": "nvme", "nvme_path": str(nvme)}
    to_files = {f"engine__{key}": value for key, value in files.items()}
    runs.add("files", vary, [(1, 2, CPU), (2, 3, to_files), (4, 1, {})])
    runs.add("memory", vary, [(2, 3, to_files), (1, 0, {}), (2, 3, CPU_ALL)])
    half = {"precision": "fp16", "initial_loss_scale_power": 10, "loss_scale_window": 2}
    scaled = {f"engine__{key}": value for key, value in half.items()}
    runs.add("half", vary, [(1, 3, {}), (4, 2, {}), (2, 0, {})], tolerance=2e-3, **scaled)
    runs.run()
    runs.compare()
    [*_, took] = [r for r in read_records(tmp_path / "files_lives") if r.get("event") == "resume"]
    assert (took["step"], took["of"], took["on"]) == (4, "2 ranks, ZeRO-3", "4 ranks, ZeRO-1")
    assert took["seconds"] > 0
    # Three tensors by fragment, and the weights once more by each rank.
    size = sum(w.numel() for w in read_masters(tmp_path / "files_lives").values()) * 4
    assert took["gb_read"] == pytest.approx((3 + 4) * size / 1e9, abs=1e-3)
