"""How far `kuroshio plan` is from what is measured here and from what others have published.

    python benchmarks/planning.py --write docs/planning.md    # 4 minutes on 2 cores

Weights, gradients and optimizer of small engines of every ZeRO stage are compared byte by byte, the
peak of forward and backward passes by torch's own count of allocations, each in processes of their
own. Published throughputs come from --published, a CSV that names its sources; without it that
table stays as it is. Prints the tables, then one line of JSON; --write puts the tables, and plans
of LLaMA-2 7B, between the markers of a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", choices=["states", "peaks", "adam"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))


def measure(what: str) -> Any:
    """Measure in this process."""
    from benchmarks.inputs import measured_memory
    from benchmarks.inputs.planned_memory import PEAK_CASES, STATE_CASES

    if what == "states":
        measured_memory.join_alone()
        return [measured_memory.measure_states(case) for case in STATE_CASES]
    if what == "peaks":
        return [measured_memory.measure_peak(case) for case in PEAK_CASES]
    return measured_memory.measure_host_adam()


if __name__ == "__main__":
    main()
