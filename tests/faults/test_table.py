"""The page says of each fault what its tests found; and every fault has tests."""

from __future__ import annotations

from pathlib import Path

from fault_record import FaultRecord, find_tests, name_test, read_results
from table import NUM_ROWS, PAGE, RESULTS, read_matrix, show_table, table_of

ROOT = Path(__file__).resolve().parents[2]


def test_every_fault_has_a_test() -> None:
    rows = {row for rows in find_tests().values() for row in rows}
    assert rows == set(range(1, NUM_ROWS + 1))
    assert list(read_matrix()) == sorted(rows)


def test_the_page_shows_the_recorded_results() -> None:
    results = read_results(RESULTS)
    assert table_of(PAGE.read_text(encoding="utf-8")) == show_table(read_matrix(), results), (
        "run `python tests/faults/table.py --write docs/reliability.md`"
    )


def test_every_result_is_of_a_test_that_is_there_and_every_fault_has_one() -> None:
    results, tests = read_results(RESULTS), find_tests()
    assert {name: result["rows"] for name, result in results.items()}.items() <= tests.items()
    passed = {row for r in results.values() if r["outcome"] == "passed" for row in r["rows"]}
    assert passed == set(range(1, NUM_ROWS + 1))
    assert not [name for name, result in results.items() if result["outcome"] == "failed"]


def test_a_test_has_one_name_for_all_its_parameters() -> None:
    assert name_test("tests/faults/test_05_full.py::test_x[a b]@gpu-1") == (
        "faults/test_05_full.py::test_x"
    )


def test_marks_are_read_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\npytestmark = [pytest.mark.slow, pytest.mark.faults(row=3)]\n"
        "@pytest.mark.faults(row=1)\ndef test_a(): pass\ndef test_b(): pass\ndef faults(): pass\n"
    )
    assert find_tests(tmp_path) == {"test_x.py::test_a": [1, 3], "test_x.py::test_b": [3]}


class Report:
    """What a report says of one phase of a test."""

    def __init__(self, nodeid: str, outcome: str, rows: list[int]) -> None:
        self.nodeid, self.outcome, self.duration, self.when = nodeid, outcome, 1.0, "teardown"
        self.user_properties = [("fault row", row) for row in rows]


def test_a_failure_stays_one_and_other_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"old": {"rows": [2], "outcome": "passed", "seconds": 1.0}}')
    record = FaultRecord(path)
    for nodeid, outcome in (("t[1]", "passed"), ("t[2]", "failed"), ("t[3]", "passed")):
        record.pytest_runtest_logreport(Report(nodeid, outcome, [4]))  # type: ignore[arg-type]
    record.pytest_runtest_logreport(Report("other", "failed", []))  # type: ignore[arg-type]
    found = read_results(path)
    assert list(found) == ["old", "t"]
    assert found["t"] == {"rows": [4], "outcome": "failed", "seconds": 3.0}
