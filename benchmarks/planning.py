"""How far `kuroshio plan` is from what is measured here and from what others have published.

    python benchmarks/planning.py --write docs/planning.md    # 3 minutes on 2 cores

Weights, gradients and optimizer of small engines of every ZeRO stage are compared byte by byte, the
peak of forward and backward passes by torch's own count of allocations, each in a process of its
own. Published throughputs come from --published, a CSV that names its sources; without it that
table stays as it is. Prints the tables, then one line of JSON; --write puts the tables, and plans
of LLaMA-2 7B, between the markers of a page.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inputs.llama_2_7b import LLAMA_2_7B  # noqa: E402
from benchmarks.inputs.planned_memory import (  # noqa: E402
    PEAK_CASES,
    STATE_CASES,
    planned_peak,
    planned_states,
)
from benchmarks.inputs.published_runs import (  # noqa: E402
    Comparison,
    assumed,
    read_rows,
    stated,
    summarise,
)

PUBLISHED = ROOT.parent / "shared/anchors/throughput_public.csv"
_LENGTHS = "data.max_length=512 stage.sampling.max_new_tokens=512 stage.rollouts_per_step=256"
_PPO = f"experiment=hh_ppo stage.rewards.judge.path=MODEL stage.critic=null {_LENGTHS}"
_LONG = "data.max_length=2048 loop.global_batch_tokens=1048576 loop.max_steps=1000"
_SHORT = "data.max_length=2048 loop.global_batch_tokens=262144 loop.max_steps=500"
_QUOTA = "cluster.site.quota_gb=1500"
GIVEN = "model=llama2_7b model.path=MODEL cluster=taiwania2"
PLANS = (
    f"--fit --rows 8 experiment=taiwan_cpt {_LONG} {_QUOTA}",
    f"--fit --rows 4 experiment=excel_qa {_SHORT}",
    f"--fit --rows 4 experiment=taiwan_dpo {_SHORT} {_QUOTA}",
    f"--fit --rows 4 {_PPO} {_QUOTA}",
    f"{_PPO} peft=lora stage.models=shared engine=zero3 engine.activation_checkpointing=true "
    "loop.micro_batch_size=8 cluster.gpus_per_node=8",
    # What is refused, and the remedy:
    f"experiment=taiwan_cpt {_LONG} cluster.gpus_per_node=8",
    "experiment=taiwan_cpt engine.precision=bf16",
    "experiment=taiwan_cpt cluster.nodes=6 cluster.gpus_per_node=8",
)


def main() -> None:
    """Measure, compare, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", choices=["states", "peaks", "adam"], help=argparse.SUPPRESS)
    parser.add_argument("--published", type=Path, default=PUBLISHED, metavar="CSV")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with markers to fill")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    states, peaks, adam = (run_child(what) for what in ("states", "peaks", "adam"))
    tables = {"states": state_table(states), "activations": peak_table(peaks)}
    tables["adam"] = f"Measured here: {adam / 1e9:.1f} GB/s on one core."
    errors = [abs(planned_peak(c) / p - 1) for c, p in zip(PEAK_CASES, peaks, strict=True)]
    results: dict[str, Any] = {"benchmark": "planning", "adam_bytes_per_s": adam}
    results["exact_states"] = [planned_states(c) for c in STATE_CASES] == states
    results["largest_activation_error"] = max(errors)
    if args.published.is_file():
        rows = read_rows(args.published)
        found = {"stated": list(stated(rows)), "assumed": list(assumed(rows))}
        tables |= {name: published_table(runs) for name, runs in found.items()}
        results |= {name: summarise(runs) for name, runs in found.items()}
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    if args.write:
        fill(args.write, tables | {"plans": plan_outputs()})
    print(json.dumps(results))


def measure(what: str) -> Any:
    """Measure in this process."""
    from benchmarks.inputs import measured_memory

    if what == "states":
        measured_memory.join_alone()
        return [measured_memory.measure_states(case) for case in STATE_CASES]
    if what == "peaks":
        return [measured_memory.measure_peak(case) for case in PEAK_CASES]
    return measured_memory.measure_host_adam()


def run_child(what: str) -> Any:
    """Measure in a fresh process."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", what]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def state_table(measured: Sequence[dict[str, int]]) -> str:
    """Return planned and measured bytes of weights, gradients and optimizer."""
    rows = []
    for case, found in zip(STATE_CASES, measured, strict=True):
        planned = planned_states(case)
        cells = [f"{planned[part]:,} / {found[part]:,}" for part in planned]
        rows.append([str(case), *cells, f"{sum(planned.values()) / sum(found.values()) - 1:+.2%}"])
    return table(["engine", "weights", "gradients", "optimizer", "error"], rows)


def peak_table(measured: Sequence[int]) -> str:
    """Return planned and measured peaks of a forward and backward pass."""
    rows = []
    for case, found in zip(PEAK_CASES, measured, strict=True):
        planned = planned_peak(case)
        shape = f"{case.num_hidden_layers} x {case.hidden_size}, {case.vocab_size:,} rows"
        heads = f"{case.num_attention_heads}/{case.num_key_value_heads}"
        batch = f"{case.rows} x {case.length}"
        again = "yes" if case.again else "no"
        sizes = f"{planned / 1e6:.1f} / {found / 1e6:.1f}"
        cells = [shape, heads, batch, case.precision, again, sizes, f"{planned / found - 1:+.1%}"]
        rows.append(cells)
    names = ["layers x width, vocabulary", "heads", "batch", "precision", "computed again"]
    return table([*names, "MB planned / measured", "error"], rows)


def published_table(runs: Sequence[Comparison]) -> str:
    """Return published and planned tokens a second and GPU."""
    rows = [
        [
            run.system,
            run.model,
            f"{run.num_gpus} {run.gpu}",
            f"{run.length:,}",
            f"{run.efficiency:.0%}",
            f"{run.planned:,.0f} / {run.published:,.0f}",
            f"{run.error:+.0%}",
        ]
        for run in runs
    ]
    names = ["system", "model", "GPUs", "row", "share of peak", "tokens/s planned / published"]
    summary = summarise(list(runs))
    return table([*names, "error"], rows) + (
        f"\n\n{summary['runs']} runs: median error {summary['median']:.1%}, largest "
        f"{summary['largest']:.0%}, within 20 %: {summary['within_20_percent']:.0%}."
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan_outputs() -> str:
    """Return what `kuroshio plan` prints of LLaMA-2 7B with 55,296 rows on Taiwania 2."""
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
        for line in PLANS:
            words = shlex.split(line.replace("MODEL", folder))
            given = [*GIVEN.replace("MODEL", folder).split(), *words]
            command = [sys.executable, "-m", "launch", "plan", *given]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode not in (0, 78):
                raise RuntimeError(f"{shlex.join(command)}: {done.stderr}")
            shown = (done.stdout + done.stderr).replace(folder, "MODEL")
            shown = "\n".join(row.rstrip() for row in shown.splitlines())
            asked = f"kuroshio plan {GIVEN} \\\n    {line}"
            texts.append(f"$ {asked}\n{shown}")
    return "\n\n".join(f"```text\n{text}\n```" for text in texts)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, also, after = rest.partition(end)
        if not (found and also):
            raise ValueError(f"{page} has no {start} … {end}")
        text = f"{before}{start}\n{content}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
