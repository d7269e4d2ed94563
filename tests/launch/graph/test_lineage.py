"""What a step was made from is recorded, compared, and refused when it changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.graph import lineage
from launch.json_file import write_json
from tokenizer.pair import write_pair_manifest
from trainer.errors import CheckpointError, ConfigError


def record(folder: Path, step: str, kind: str, *parents: str, stage: str | None = None) -> None:
    write_json(
        lineage.record_path(folder, step),
        {"kind": kind, "parents": list(parents), "stage": stage},
    )


def write_checkpoint(run: Path, step: int, evaluated: bool = True, note: str = "") -> None:
    place = run / "checkpoints" / f"step_{step:08d}"
    place.mkdir(parents=True)
    manifest = {"step": step, "state": {"evaluated": evaluated}, "note": note}
    (place / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text("loop: {max_steps: 4}\n")


@pytest.fixture
def model(tmp_path: Path, english_tokenizer: Path) -> Path:
    """Return an exported model as the step ``model``, beside the run it is of."""
    import shutil

    import torch
    from safetensors.torch import save_file

    from trainer.models.identity import model_identity

    record(tmp_path, "base", "run", stage="pretrain")
    write_checkpoint(tmp_path / "base", 4)
    record(tmp_path, "model", "export", "base")
    folder = tmp_path / "model"
    shutil.copytree(english_tokenizer, folder)
    weights = {"model.embed_tokens.weight": torch.arange(800.0).reshape(400, 2)}
    save_file(weights, folder / "model.safetensors")
    write_pair_manifest(folder, folder, {"model_identity": model_identity(folder)})
    record(tmp_path, "tuned", "run", "model", stage="sft")
    return folder


def test_a_run_is_complete_with_its_last_checkpoint_evaluated(tmp_path: Path) -> None:
    record(tmp_path, "base", "run", stage="pretrain")
    assert not lineage.is_complete(tmp_path, "base")
    write_checkpoint(tmp_path / "base", 2)
    assert not lineage.is_complete(tmp_path, "base")
    write_checkpoint(tmp_path / "base", 4, evaluated=False)
    assert not lineage.is_complete(tmp_path, "base")
    path = tmp_path / "base/checkpoints/step_00000004/manifest.json"
    path.write_text(json.dumps({"step": 4, "state": {"evaluated": True}}))
    assert lineage.is_complete(tmp_path, "base")
    assert not lineage.is_complete(tmp_path, "unknown")


def test_a_vocabulary_is_complete_by_its_manifest(tmp_path: Path) -> None:
    record(tmp_path, "vocab", "run", stage="vocab")
    for complete in (False, True):
        write_json(tmp_path / "vocab/manifest.json", {"complete": complete})
        assert lineage.is_complete(tmp_path, "vocab") is complete


def test_a_step_begins_with_what_its_parents_hold(model: Path, tmp_path: Path) -> None:
    lineage.begin(tmp_path, "tuned")
    pair = json.loads((model / "kuroshio.json").read_text())
    found = json.loads(lineage.inputs_path(tmp_path, "tuned").read_text())["parents"]["model"]
    assert found["tokenizer"] == pair["tokenizer_fingerprint"]
    assert found["model"] == pair["model_identity"]
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/lives.jsonl").write_text("{}\n")
    lineage.begin(tmp_path, "tuned")  # as it was


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", '"byte_fallback": false', "another tokenizer than kuroshio.json says"),
        ("chat_template.jinja", "{{ messages }}", "another chat template than kuroshio.json says"),
        ("model.safetensors", "", "another model than kuroshio.json says"),
    ],
)
def test_a_parent_that_was_changed_is_refused(
    file: str, change: str, message: str, model: Path, tmp_path: Path
) -> None:
    path = model / file
    if file == "tokenizer.json":
        path.write_text(path.read_text().replace('"byte_fallback": true', change))
    elif change:
        path.write_text(change)
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(ConfigError) as caught:
        lineage.begin(tmp_path, "tuned")
    assert f"parent step model: {model} was changed after it was made: {message}" in str(
        caught.value
    )
    assert not lineage.inputs_path(tmp_path, "tuned").exists()


def test_a_parent_that_is_missing_is_refused(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"parent step model has not finished: .* is not there"):
        lineage.begin(tmp_path, "tuned")


def test_a_step_that_began_refuses_other_parents(model: Path, tmp_path: Path) -> None:
    lineage.begin(tmp_path, "tuned")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/lives.jsonl").write_text("{}\n")
    path = lineage.inputs_path(tmp_path, "tuned")
    inputs = json.loads(path.read_text())
    inputs["parents"]["model"]["tokenizer"] = "of another one"
    path.write_text(json.dumps(inputs))
    with pytest.raises(ConfigError, match="began with other inputs: parent model has another tok"):
        lineage.begin(tmp_path, "tuned")
    (tmp_path / "tuned/lives.jsonl").unlink()  # a folder that was emptied begins anew
    lineage.begin(tmp_path, "tuned")
    assert json.loads(path.read_text()) != inputs


def test_a_run_outside_of_pipelines_has_nothing_to_check(tmp_path: Path) -> None:
    lineage.begin_run(str(tmp_path / "alone"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_told_from_another_of_its_step(tmp_path: Path) -> None:
    record(tmp_path, "base", "run", stage="pretrain")
    facts = []
    for note in ("one", "two"):
        write_checkpoint(tmp_path / note, 4, note=note)
        (tmp_path / note).rename(tmp_path / "base")
        facts.append(lineage.output_facts(tmp_path, "base"))
        (tmp_path / "base").rename(tmp_path / f"old_{note}")
    assert lineage.changed_inputs({"base": facts[0]}, {"base": facts[1]}) == [
        "parent base has another checkpoint now"
    ]


def test_values_that_change_no_result_may_differ() -> None:
    before: dict[str, Any] = {
        "run_dir": "a",
        "cluster": {"nodes": 1},
        "loop": {"save_every": 1, "max_steps": 3},
        "model": {"path": "runs/x"},
    }
    now = {
        "run_dir": "b",
        "cluster": {"nodes": 2},
        "loop": {"save_every": 9, "max_steps": 4},
        "model": {"path": str(Path.cwd() / "runs/x")},
    }
    assert lineage.changed_values(before, now) == ["loop.max_steps: 3 there, 4 now"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = lineage.record_path(tmp_path, "x")
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        lineage.begin(tmp_path, "x")
