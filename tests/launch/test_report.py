"""`kuroshio report`: the page of a run has what the run recorded, and nothing from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.report import main
from trainer.errors import ConfigError, StorageError
from trainer.metrics.journal import encode_line
from trainer.metrics.report import load_run, render_report, show_number, write_report

CONFIG = {
    "name": "黑潮-tiny",
    "loop": {"max_steps": 40},
    "optim": {"lr": 0.00031},
    "hub_token": "do-not-show",
}


def journal_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"split": "event", "step": 0, "time": 1e9, "event": "environment", "torch": "2.13.0",
         "host": "node-7", "ranks": 2},
        {"split": "event", "step": 0, "time": 1e9, "event": "mixture",
         "epochs": {"法律": 1.37, "english": 0.25}, "tokens": {"法律": 123456}},
    ]  # fmt: skip
    for step in range(1, 31):
        lines.append(
            {"split": "train", "step": step, "time": 1e9 + step, "loss": 5 - step / 10, "lr": 3e-4,
             "grad_norm": "inf" if step == 4 else 0.75, "tokens": step * 1000,
             "tokens_per_s": 8123.0, "memory_gib": 1.625, "mfu": 0.4321,
             "epoch": step / 8, "trained_share": 0.412, "padding_share": 0.0213}
        )  # fmt: skip
    for step, figure in ((0, 6.1234), (10, 4.4321), (30, 2.3456)):
        figures = {
            "loss": figure / 2,
            "perplexity": figure * 3,
            "bits_per_character": figure,
            "bits_per_byte": figure / 3,
            "num_tokens": 54321,
            "num_chars": 98765,
        }
        sources = {"法律": figures, "english <b>": {**figures, "bits_per_character": 2.5}}
        lines.append({"split": "eval", "step": step, "time": 1e9 + step, "sources": sources})
    lines += [
        {"split": "event", "step": 20, "time": 1e9 + 20, "event": "save",
         "path": "checkpoints/step-20"},
        {"split": "event", "step": 20, "time": 1e9 + 50, "event": "resume", "ranks": 4},
        {"split": "sample", "step": 30, "time": 1e9 + 60, "prompt": "臺灣的",
         "text": "東部<script>alert(1)</script>\x04"},
    ]  # fmt: skip
    return lines


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, allow_unicode=True), "utf-8")
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_line, journal_lines())))
    lives = [{"started": "2026-01-02T03:04:05", "host": host, "job": None} for host in ("a1", "b2")]
    (folder / "lives.jsonl").write_bytes(b"".join(map(encode_line, lives)))
    return folder


class Page(HTMLParser):
    """Collects the visible text, references and unbalanced tags of a page."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.references, self.open = "", list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data.strip()}"


def test_page_has_every_figure(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_dir)])
    path = Path(capsys.readouterr().out.strip())
    assert path == run_dir / "report.html"
    html = path.read_text("utf-8")
    page = Page(html)
    assert page.open == []
    for record in journal_lines():
        for figures in record.get("sources", {}).values():
            for value in figures.values():
                assert show_number(value) in page.text or f"{value:g}" in page.text, value
    for part in ("黑潮-tiny", "30 / 40", "not finished", "2.0000", "30.0k", "8.1k", "1.62 GiB",
                 "3.75", "41.2%", "2.1%",
                 "43.2%", "1 not finite", "6.1234 → 2.3456", "-61.7 %", "+0.0 %", "epochs", "1.37",
                 "2.13.0", "node-7", "checkpoints/step-20", "resume", "臺灣的",
                 "0.00031", "Lives 2", "2026-01-02T03:04:05 b2 –"):  # fmt: skip
        assert part in re.sub(r"\s+", " ", page.text), part
    for title in ("Training loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory",
                  "Bits per character", "Perplexity", "utilisation"):  # fmt: skip
        assert title in page.text
    assert html.count("<svg") == 8


def test_page_is_self_contained_and_escaped(run_dir: Path) -> None:
    html = write_report(run_dir).read_text("utf-8")
    assert "<script" not in html and "english <b>" not in html
    assert "english &lt;b&gt;" in html and "&lt;script&gt;" in html
    assert "\x04" not in html and "\u2404" in html
    references = Page(html).references
    assert references and all(reference.startswith("#") for reference in references)
    assert not re.search(r"url\((?!#)|@import|<link|<img", html)


def test_page_of_a_reward_model(run_dir: Path) -> None:
    """Plots and tables are those of the last evaluation; texts in them are escaped."""
    lines: list[dict[str, Any]] = []
    for step, accuracy in ((0, 0.5), (30, 0.6215)):
        figures = {"loss": 0.7, "accuracy": accuracy, "accuracy_low": 0.5432,
                   "accuracy_high": 0.6789, "num_pairs": 321}  # fmt: skip
        pair = {"chosen": f"<em>{step}</em>", "margin": 1.2345678 + step}
        bins = [{"confidence": 0.55, "accuracy": 0.5, "num": 1200 + step}]
        lines += [
            {"split": "eval", "step": step, "time": 1e9, "sources": {"pairs": figures}},
            {"split": "plot", "step": step, "kind": "histogram", "title": "Held-out rewards",
             "edges": [-1.0, 0.0, 1.0], "counts": {"chosen": [1, 2], "rejected <i>": [2, 1]}},
            {"split": "plot", "step": step, "kind": "calibration", "title": "Right how often",
             "bins": bins},
            {"split": "table", "step": step, "title": "Margins", "rows": [pair]},
        ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    html = write_report(run_dir).read_text("utf-8")
    page = Page(html)
    assert page.open == [] and "<em>" not in html and "<i>" not in html
    text = re.sub(r"\s+", " ", page.text)
    for part in ("0.5000 → 0.6215 (54.3% to 67.9%)", "pairs in the bins: 1,230", "rejected <i>",
                 "<em>30</em> 31.23", "Accuracy low", "321"):  # fmt: skip
        assert part in text, part
    for gone in ("<em>0</em>", "1,200", "Bits per character"):
        assert gone not in text
    assert text.count("Held-out rewards") == 1 and html.count("<svg") == 3


def test_secrets_do_not_reach_the_page(run_dir: Path) -> None:
    html = write_report(run_dir).read_text("utf-8")
    assert "do-not-show" not in html and "[redacted]" in html


def test_running_without_evaluation_and_with_a_torn_line(run_dir: Path) -> None:
    lines = [encode_line(line) for line in journal_lines() if line["split"] == "train"]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"split": "train", "ste')
    html = render_report(load_run(run_dir))
    assert "Before and after" not in html and "Training loss" in html and html.count("<svg") == 6


def test_what_the_guards_did_is_marked_on_the_loss(run_dir: Path) -> None:
    whole = Page(render_report(load_run(run_dir)))
    assert "a skipped step" not in whole.text and "rolled back" not in whole.text
    skip = {"split": "event", "step": 7, "time": 1e9, "event": "skip", "why": "a spike"}
    lines = [*journal_lines(), skip, skip | {"step": 9}]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    html = render_report(load_run(run_dir))
    assert Page(html).text.count("a skipped step") == 1 and "rolled back" not in html
    back = skip | {"event": "roll_back", "step": 4}
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, [*lines, back])))
    assert Page(render_report(load_run(run_dir))).text.count("rolled back to this step") == 1


def test_slow_ranks_have_a_table_and_a_curve(run_dir: Path) -> None:
    assert "Slowest rank" not in render_report(load_run(run_dir))
    slow = {"rank": 3, "host": "node-<9>", "seconds": 0.9, "data_seconds": 0.625}
    lines = [
        {"split": "train", "step": 1, "slowest_rank": 3, "slowest_rank_delay_s": 0.5},
        {"split": "ranks", "step": 1, "median_s": 0.4, "slowest": [slow]},
    ]
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    page = Page(render_report(load_run(run_dir)))
    for part in ("Ranks", "3 node-<9> 1 0.9 0.625 0.5", "Slowest rank over the median"):
        assert part in re.sub(r"\s+", " ", page.text), part


def test_run_that_has_not_stepped_yet(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert "No step is recorded yet." in render_report(load_run(run_dir))


def test_journal_alone_is_enough(run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()
    (run_dir / "lives.jsonl").unlink()
    page = Page(render_report(load_run(run_dir)))
    assert (
        "Configuration" not in page.text
        and "Lives" not in page.text
        and "Training loss" in page.text
    )


def test_a_repeated_evaluation_counts_once(run_dir: Path) -> None:
    again = {
        "split": "eval",
        "step": 30,
        "time": 2e9,
        "sources": {"法律": {"bits_per_character": 1.0}},
    }
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(encode_line(again))
    run = load_run(run_dir)
    assert [record["step"] for record in run.evals] == [0, 10, 30]
    assert run.evals[-1]["sources"] == again["sources"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run.*metrics\.jsonl; give"):
        main([str(tmp_path)])


def test_out_is_written_and_its_failure_told(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run_dir), "--out", str(tmp_path / "pages" / "one.html")])
    assert (tmp_path / "pages" / "one.html").exists() and not (run_dir / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="give another file with --out"):
        write_report(run_dir, tmp_path / "file" / "one.html")


def test_help_needs_no_heavy_import(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "RUN" in capsys.readouterr().out
