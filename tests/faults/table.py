"""The table of faults in docs/reliability.md, from the results of their tests.

    pytest tests -m faults --fault-results=tests/faults/results.json
    python tests/faults/table.py --write docs/reliability.md

``matrix.yaml`` beside this file says of each fault what it is, how it is injected, what Kuroshio
does, and what others do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fault_record import Results, read_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "reliability.md"
NUM_ROWS = 23
BEGIN, END = "<!-- table: tests/faults/table.py -->", "<!-- end of the table -->"
COLUMNS = ("", "fault", "how it is injected", "what Kuroshio does", "tests", "others")
SIGNS = {"passed": "passed", "failed": "**failed**", "skipped": "skipped here"}
Row = dict[str, str]


def read_matrix(path: Path = HERE / "matrix.yaml") -> dict[int, Row]:
    """Return of each fault, by its number, ``fault``, ``injected``, ``answer`` and ``others``."""
    rows: dict[int, Row] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return rows


def show_table(matrix: Mapping[int, Row], results: Results) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for number, row in matrix.items():
        found = {name: r for name, r in results.items() if number in r["rows"]}
        cells = [str(number), row["fault"], row["injected"], row["answer"], show_tests(found)]
        lines.append("| " + " | ".join(map(flatten, [*cells, row["others"]])) + " |")
    return "\n".join(lines)


def show_tests(results: Results) -> str:
    """Return files and the number of tests by outcome, each file a link."""
    files: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        files.setdefault(name.partition("::")[0], []).append(result)
    return "<br>".join(
        f"[{Path(file).name}](../tests/{file}): {count_outcomes(found)}"
        for file, found in files.items()
    )


def count_outcomes(results: list[dict[str, Any]]) -> str:
    """Return for example "2 passed, 1 skipped here"."""
    outcomes = [result["outcome"] for result in results]
    return ", ".join(f"{outcomes.count(o)} {SIGNS[o]}" for o in SIGNS if o in outcomes)


def flatten(text: str) -> str:
    """Return text that fits into a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table_of(page: str) -> str:
    """Return the table that a page holds."""
    return split_page(page)[1]


def split_page(page: str) -> list[str]:
    """Return what stands before the table, the table, and what stands after it."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    table, end, after = rest.partition(f"\n{END}")
    assert begin and end, f"the page has no place for the table: {BEGIN}"
    return [before + begin, table, end + after]


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    table = show_table(read_matrix(), read_results(options.results))
    if not options.write:
        print(table)
        return
    before, _, after = split_page(options.write.read_text(encoding="utf-8"))
    options.write.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
