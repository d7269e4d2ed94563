"""The main job on real texts: base, vocabulary, continued pretraining, initialisations compared.

Not part of ``make bench``: about twenty minutes on two CPU cores. Every step is a
``kuroshio`` command; a second call goes on where the first was stopped. Tables first, then JSON on
the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INITS = ("subpiece_mean", "mean", "normal")
COMPARED_STEPS = 40


def main() -> None:
    """Run everything below ``--out`` and print what it did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default="../shared/data", help="folder with the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/taiwan"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every training run")
    options = parser.parse_args()
    os.chdir(ROOT)
    out = options.out
    shared = [f"data_root={options.data_root}", f"data.store_dir={out}/store"]
    train = [*shared, *options.set]
    run("experiment=taiwan_base", *train, f"run_dir={out}/base")
    if not (out / "base_model").exists():
        kuroshio("export", str(out / "base"), str(out / "base_model"))
    for init in INITS:
        vocab = [*shared, f"model.path={out}/base_model", f"stage.init={init}"]
        run("experiment=taiwan_vocab", *vocab, f"run_dir={out}/vocab_{init}")
    for init in INITS:
        short = [f"model.path={out}/vocab_{init}/model", f"loop.max_steps={COMPARED_STEPS}"]
        short += ["loop.eval_every=0", "loop.save_every=0", "stage.sample_prompts=[]"]
        run("experiment=taiwan_cpt", *train, *short, f"run_dir={out}/cpt_{init}_short")
    whole = [f"model.path={out}/vocab_{INITS[0]}/model", f"run_dir={out}/cpt"]
    run("experiment=taiwan_cpt", *train, *whole)
    if not (out / "model").exists():
        kuroshio("export", str(out / "cpt"), str(out / "model"))
    kuroshio("report", str(out / "cpt"))
    show(out)


def run(*words: str) -> None:
    """Run one stage."""
    kuroshio("run", *words)


def kuroshio(*words: str) -> None:
    """Run one command; its failure ends the script."""
    print(f"$ kuroshio {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "launch", *words], check=True)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Return the figures by source of every evaluation."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record["sources"] for record in records if record["split"] == "eval"]


def density(figures: dict[str, Any]) -> float:
    """Return tokens per character."""
    return figures["num_tokens"] / figures["num_chars"]


def show(out: Path) -> None:
    """Print both tables and, on the last line, their figures as JSON."""
    base, cpt = evaluations(out / "base")[-1], evaluations(out / "cpt")
    result: dict[str, Any] = {"sources": {}, "inits": {}}
    print(
        "\n| source | tokens/char | bits/char: base | extended | continued |\n|---|---|---|---|---|"
    )
    for name in base:
        row = [density(base[name]), density(cpt[0][name])]
        row += [f[name]["bits_per_character"] for f in (base, cpt[0], cpt[-1])]
        result["sources"][name] = row
        print(
            f"| {name} | {row[0]:.3f} → {row[1]:.3f} | " + " | ".join(f"{v:.4f}" for v in row[2:])
        )
    print(
        f"\n| init | source | bits/char at step 0 | at step {COMPARED_STEPS} |\n|---|---|---|---|"
    )
    for init in INITS:
        short = evaluations(out / f"cpt_{init}_short")
        for name in base:
            row = [f[name]["bits_per_character"] for f in (short[0], short[-1])]
            result["inits"].setdefault(init, {})[name] = row
            print(f"| {init} | {name} | {row[0]:.4f} | {row[1]:.4f} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
