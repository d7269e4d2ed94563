"""``kuroshio run pipeline=…``: the order, what is left out, what a failure holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import ROOT, pipeline, run
from launch.graph import progress
from launch.graph.state import read_states
from launch.json_file import write_json
from trainer.errors import EXIT_RESUME, ConfigError, DataError

TEXT = """
steps:
  letters: {{tokenizer: {{paths: [{texts}], vocab_size: 400}}}}
  base:
    run: [stage=pretrain, data=samples, model=tiny, "tokenizer.path=@{{letters}}", loop.max_steps=4]
  second:
    run: [stage=pretrain, data=samples, model=tiny, "tokenizer.path=@{{letters}}", loop.max_steps=4]
  base_model: {{export: {{run: "@{{base}}"}}}}
  tuned: {{run: [stage=sft, data=chat_samples, model=folder, "model.path=@{{base_model}}"]}}
"""


class Ranks:
    """Stands in for the ranks: notes what ran and leaves a finished run's checkpoint."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.codes: dict[str, int | BaseException] = {}

    def start(self, values: dict[str, Any]) -> int:
        place = Path(values["run_dir"])
        self.ran.append(place.name)
        place.mkdir(exist_ok=True)
        (place / "lives.jsonl").write_text("{}\n")
        code = self.codes.get(place.name, 0)
        if isinstance(code, BaseException):
            raise code
        if code == 0:
            step = place / "checkpoints/step_00000004"
            step.mkdir(parents=True)
            manifest = {"step": 4, "state": {"evaluated": True}}
            (step / "manifest.json").write_text(json.dumps(manifest))
            (place / "config.yaml").write_text("loop: {max_steps: 4}\n")
        return code

    def export(self, arguments: list[str]) -> int:
        place = Path(arguments[1])
        self.ran.append(place.name)
        place.mkdir()
        (place / "adapter_model.safetensors").write_bytes(b"weights")
        return 0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    from launch import export

    ranks = Ranks()
    monkeypatch.setattr(run, "start_ranks", ranks.start)
    monkeypatch.setattr(export, "main", ranks.export)
    return ranks


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    texts = tmp_path / "texts.jsonl"
    lines = (ROOT / "samples/en.jsonl").read_text(encoding="utf-8")
    texts.write_text(lines, encoding="utf-8")
    file = tmp_path / "p.yaml"
    file.write_text(TEXT.format(texts=texts), encoding="utf-8")
    return [f"pipeline={file}", f"dir={tmp_path}/out"]


def states(tmp_path: Path) -> dict[str, str]:
    return {name: step.state for name, step in read_states(tmp_path / "out").items()}


def test_a_failed_step_holds_its_children_alone_and_the_next_call_goes_on(
    words: list[str], ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.codes = {"base": DataError("no text"), "tuned": 0}
    assert pipeline.main(words) == DataError.exit_code
    assert ranks.ran == ["base", "second"]
    found = read_states(tmp_path / "out")
    assert {name: step.state for name, step in found.items()} == {
        "letters": "done",
        "base": "failed",
        "second": "done",
        "base_model": "held",
        "tuned": "held",
    }
    assert (found["base"].exit_code, found["base"].reason) == (65, "no text")
    assert found["base_model"].reason == "base has not finished"
    assert f"`kuroshio run {' '.join(words)}` goes on from there" in capsys.readouterr().out
    ranks.codes, ranks.ran = {}, []
    assert pipeline.main(words) == 0
    assert ranks.ran == ["base", "base_model", "tuned"]
    assert set(states(tmp_path).values()) == {"done"}
    ranks.ran = []
    assert pipeline.main(words) == 0  # nothing has changed
    assert ranks.ran == []


def test_a_signal_stops_the_whole(words: list[str], ranks: Ranks, tmp_path: Path) -> None:
    ranks.codes = {"base": EXIT_RESUME}
    assert pipeline.main(words) == EXIT_RESUME
    assert ranks.ran == ["base"]
    assert states(tmp_path)["base"] == "stopped" and states(tmp_path)["second"] == "waiting"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")])
def test_no_step_stays_running_when_the_process_ends(
    words: list[str], ranks: Ranks, tmp_path: Path, error: BaseException
) -> None:
    ranks.codes = {"base": error}
    with pytest.raises(type(error)):
        pipeline.main(words)
    found = read_states(tmp_path / "out")["base"]
    assert (found.state, found.exit_code) == ("failed", 1)
    assert str(found.reason).startswith(type(error).__name__)


def test_what_changed_is_said_before_anything_runs(
    words: list[str], ranks: Ranks, tmp_path: Path
) -> None:
    pipeline.main(words)
    ranks.ran, out = [], tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        pipeline.main([*words, "base.optim.lr=0.5"])
    text = str(caught.value)
    assert "step base was begun with other values:\n  optim.lr: " in text and "0.5 now" in text
    assert f"rm -r {out}/base {out}/base_model {out}/tuned" in text and "second" not in text
    pipeline.main([*words, "loop.log_every=7", "base.cluster.timeout_s=9"])  # changes no result
    assert ranks.ran == []
    write_json(out / "letters/tokenizer.json", {"another": "one"})
    assert pipeline.main(words) == ConfigError.exit_code
    step = read_states(out)["base"]
    assert ranks.ran == []
    assert "step base was made from other inputs: parent letters has another tok" in str(
        json.loads((out / "pipeline.json").read_text())["steps"]["base"]["reason"]
    ), step


def test_a_dry_run_writes_nothing(
    words: list[str], ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists() and ranks.ran == []
    assert f"to do    base_model: kuroshio export {tmp_path}/out/base" in capsys.readouterr().out


def test_a_step_that_began_is_not_done(words: list[str], ranks: Ranks, tmp_path: Path) -> None:
    ranks.codes = {"base": 76}
    assert pipeline.main(words) == 76
    found = pipeline.read_pipeline(words)
    assert progress.is_done(found, found.steps["letters"])
    assert not progress.is_done(found, found.steps["base"])
