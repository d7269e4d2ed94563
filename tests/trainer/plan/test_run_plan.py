"""A run's plan: what splits over ranks, what limits refuse, what a search finds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.inputs.llama_2_7b import LLAMA_2_7B
from trainer.plan.memory import EnginePlan, Model, state_bytes
from trainer.plan.parameters import Tuning
from trainer.plan.run_plan import plan_run
from trainer.plan.search import changes_of, search
from trainer.plan.speed import Pass, network_bytes_per_s, pass_flops, step_traffic
from trainer.plan.work import Machine, Price, Rollout, RunPlan, Work

V100 = Machine(
    "taiwania2",
    nodes=4,
    gpus_per_node=8,
    gpu="V100-SXM2-32GB",
    gpu_memory_gb=32,
    memory_gb_per_gpu=90,
    cpus_per_gpu=4,
    whole_node_gpus=8,
    intra_gb_per_s=150,
    inter_gb_per_s=6.25,
    quota_gb=1500,
    limit_hours=48,
    max_gpus=40,
    max_lives=20,
    prices=(Price("academic", "NT$", 20.0, "a page", "2026-01"),),
)


def make_work(**changes: Any) -> Work:
    policy = Model("policy", LLAMA_2_7B, Tuning())
    tokens = 2**20
    work = Work(
        "pretrain",
        (policy,),
        (Pass(policy, tokens, 2048, trains=True),),
        row_length=2048,
        micro_batch_size=1,
        num_steps=1000,
        tokens_per_step=tokens,
    )
    return dataclasses.replace(work, **changes)


def plan(engine: EnginePlan, machine: Machine = V100, **changes: Any) -> RunPlan:
    return plan_run(make_work(**changes), engine, machine)


def test_zero_splits_what_its_paper_says() -> None:
    """For 7.5 B parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB (arXiv:1910.02054, fig. 1).

    Ours keeps gradients in fp32, so stages 1 to 3 hold 4 bytes of them where the figure has 2.
    """
    model = Model("policy", LLAMA_2_7B, Tuning())
    number = model.counts.trained
    for stage, per_parameter in ((0, 2 + 2 + 12), (1, 2 + 4 + 12 / 64), (2, 2 + 16 / 64)):
        sizes = state_bytes([model], EnginePlan(stage, "fp16"), 64).gpu
        assert sum(sizes.values()) == pytest.approx(per_parameter * number)
    sizes = state_bytes([model], EnginePlan(3, "fp16"), 64).gpu
    assert sum(sizes.values()) == pytest.approx(18 / 64 * number)


def test_offload_moves_states_to_host_and_disk() -> None:
    model = [Model("policy", LLAMA_2_7B, Tuning())]
    number = model[0].counts.trained
    cpu = state_bytes(model, EnginePlan(3, "bf16", "cpu", "cpu"), 8)
    assert cpu.host["optimizer"] == 12 * number / 8
    assert cpu.host["weights: policy"] == 2 * number / 8
    disk = state_bytes(model, EnginePlan(3, "bf16", "nvme", "nvme"), 8)
    assert disk.nvme == 14 * number / 8 and "optimizer" not in disk.host


def test_parts_add_up_to_the_peak() -> None:
    found = plan(EnginePlan(2, "fp16"))
    assert found.peak_bytes == sum(found.memory.values())
    again = plan(EnginePlan(2, "fp16", activation_checkpointing=True))
    assert again.memory["activations"] < found.memory["activations"] / 5
    assert again.flops_per_step > 1.2 * found.flops_per_step
    assert found.checkpoint_bytes == 12 * found.trained_parameters


def test_time_hours_jobs_and_price_follow() -> None:
    found = plan(EnginePlan(2, "fp16"), dataclasses.replace(V100, limit_hours=4.1))
    assert found.step_seconds == pytest.approx(sum(v or 0 for v in found.step_parts.values()))
    compute = found.flops_per_step / (125e12 * 0.35 * 32)
    assert found.step_parts["compute"] == pytest.approx(compute)
    assert found.hours == pytest.approx(found.step_seconds * 1000 / 3600)
    assert found.num_jobs == -(-found.hours // 4)  # a tenth of an hour of each is overhead
    assert found.gpu_hours == pytest.approx(32 * found.hours)
    assert [cost.amount for cost in found.costs] == [pytest.approx(20 * found.gpu_hours)]


def test_what_is_unknown_stays_unknown() -> None:
    bare = Machine("somewhere", nodes=2, gpus_per_node=8)
    found = plan(EnginePlan(2, "bf16"), bare)
    unknown = (found.gpu_bytes, found.step_seconds, found.hours, found.num_jobs, found.gpu_hours)
    assert unknown == (None,) * 5 and found.costs == () and found.problems == ()
    assert "cluster.site.gpu=null" in found.remarks[0]
    no_network = plan(EnginePlan(2, "fp16"), dataclasses.replace(V100, intra_gb_per_s=None))
    assert no_network.step_parts["network"] is None and no_network.step_seconds
    assert any("bandwidths" in remark for remark in no_network.remarks)


@pytest.mark.parametrize(
    ("machine", "changes", "expected"),
    [
        ({"nodes": 1}, {"micro_batch_size": 4}, "GB on each V100-SXM2-32GB of 32 GB"),
        ({"memory_gb_per_gpu": 10.0}, {}, "of a node's memory"),
        ({"quota_gb": 200.0}, {}, "cluster.site.quota_gb=200; loop.keep_last=1 fits"),
        ({"quota_gb": 100.0}, {}, "train fewer parameters"),
        ({"quota_gb": 1000.0}, {"keep_every": 10}, "loop.keep_every=0 loop.keep_last=11 fits"),
        ({}, {"keep_gb": 100.0}, "loop.keep_gb=100 cannot hold a checkpoint of"),
        ({"max_lives": 2, "limit_hours": 1.0}, {}, "cluster.max_lives=2"),
    ],
)
def test_refusals_name_the_limit(
    machine: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    site = dataclasses.replace(V100, **machine)
    found = plan(EnginePlan(2, "fp16"), site, **changes)
    assert expected in "\n".join(found.problems)


def test_a_budget_bounds_what_checkpoints_take() -> None:
    work = {"keep_every": 10, "num_steps": 1000}
    found = plan(EnginePlan(2, "fp16"), V100, keep_gb=300.0, **work)
    assert found.problems == () and 200e9 < found.disk_bytes <= 300e9
    assert plan(EnginePlan(2, "fp16"), V100, **work).disk_bytes > 5e12


def test_search_finds_what_fits_by_price_and_why_the_rest_does_not() -> None:
    def divides(size: int, ranks: int) -> bool:
        return 2**20 % (2048 * size * ranks) == 0

    found = search(make_work(), EnginePlan(2, "fp16"), V100, divides)
    assert found.fitting and all(not each.problems for each in found.fitting)
    prices = [each.costs[0].amount for each in found.fitting]
    assert prices == sorted(prices)
    assert all(each.num_gpus <= 40 and 512 % each.num_gpus == 0 for each in found.fitting)
    never = {(r.engine.zero_stage, r.engine.offload_optimizer): r.reason for r in found.refused}
    assert "GB on each V100" in never[0, "none"]
    words = changes_of(found.fitting[0])
    assert words["engine.activation_checkpointing"] in ("true", "false")
    again = plan_run(
        make_work(micro_batch_size=int(words["loop.micro_batch_size"])),
        EnginePlan(
            int(words["engine.zero_stage"]),
            "fp16",
            words["engine.offload_optimizer"],  # type: ignore[arg-type]
            words["engine.offload_params"],  # type: ignore[arg-type]
            words["engine.activation_checkpointing"] == "true",
        ),
        dataclasses.replace(V100, nodes=int(words["cluster.nodes"]), gpus_per_node=8),
    )
    assert again.problems == () and again.step_seconds == found.fitting[0].step_seconds


def test_traffic_by_stage() -> None:
    work = make_work()
    number = work.models[0].counts.trained

    def sent(stage: int) -> float:
        return step_traffic(
            work.passes, EnginePlan(stage, "fp16"), 2, trained=number, micro_tokens=2**18
        ).network

    # Halves travel; 2 backward passes a rank. All-reduce counts twice (ZeRO, section 7).
    half = number  # 2 bytes of half the numbers
    assert sent(0) == 2 * half
    assert sent(1) == 3 * half
    assert sent(2) == 5 * half
    assert sent(3) == 2 * half + 4 * half


def test_rings_are_as_fast_as_their_slowest_link() -> None:
    assert network_bytes_per_s(150, 6.25, 1, 8) == 150e9
    assert network_bytes_per_s(150, 6.25, 4, 8) == 50e9
    assert network_bytes_per_s(150, None, 4, 8) is None
    assert network_bytes_per_s(None, 6.25, 4, 1) == 6.25e9


def test_flops_of_a_pass() -> None:
    policy = Model("policy", LLAMA_2_7B, Tuning())
    shape = policy.shape
    weights = shape.matmul_params + shape.head_params
    attention = 2 * shape.num_hidden_layers * shape.attention_width * 2049
    forward = pass_flops(Pass(policy, 1.0, 2048), recomputes=False)
    assert forward == 2 * weights + attention
    assert pass_flops(Pass(policy, 1.0, 2048, trains=True), recomputes=False) == 3 * forward
    again = pass_flops(Pass(policy, 1.0, 2048, trains=True), recomputes=True)
    assert again == 4 * forward - 2 * shape.head_params  # the head is not computed again
    adapter = Model("policy", LLAMA_2_7B, Tuning("lora", rank=8))
    trained = pass_flops(Pass(adapter, 1.0, 2048, trains=True), recomputes=False)
    assert 2 * forward < trained < 2.1 * forward


def test_too_many_keys_and_values_are_named_with_a_number_that_fits() -> None:
    policy = Model("policy", LLAMA_2_7B, Tuning("lora", rank=8))
    rollout = Rollout(policy, 256, 512, 512, cached_tokens=32768)
    passes = (Pass(policy, 2**18, 1024, trains=True),)
    work = make_work(models=(policy,), passes=passes, row_length=1024, rollout=rollout)
    site = dataclasses.replace(V100, nodes=1)
    found = plan_run(work, EnginePlan(3, "fp16"), site)
    (problem,) = found.problems
    number = int(problem.partition("stage.sampling.cached_tokens=")[2].split()[0])
    smaller = dataclasses.replace(work, rollout=dataclasses.replace(rollout, cached_tokens=number))
    assert plan_run(smaller, EnginePlan(3, "fp16"), site).problems == ()
