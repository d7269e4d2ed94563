"""The frozen config: same run resumes, another is refused, lives are recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launch import run_folder
from launch.compose import compose_values
from launch.validation import complete_section
from trainer.config import RunConfig, load_config
from trainer.errors import CheckpointError, ConfigError, StorageError


def config(run_dir: Path, *overrides: str) -> RunConfig:
    return load_config(compose_values([f"run_dir={run_dir}", *overrides]))


def test_frozen_config_is_plain_yaml_and_complete(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "run"
    asked = config(run_dir, "log=wandb")
    assert run_folder.claim(run_dir, asked) == {}
    values = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert load_config(values) == asked
    assert [p.name for p in run_dir.iterdir()] == ["config.yaml"]  # no temporary file left


def test_same_config_resumes_and_keeps_the_file(tmp_path: Path) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    assert run_folder.claim(tmp_path, config(tmp_path)) == {}
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == before


def test_another_config_is_refused_with_both_values_of_every_key(tmp_path: Path) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    frozen = (tmp_path / "config.yaml").read_bytes()
    other = config(tmp_path, "optim.lr=0.1", "loop.seed=3", "+data.sources.x.paths=[a]")
    with pytest.raises(ConfigError) as caught:
        run_folder.claim(tmp_path, other)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "optim.lr: 0.0003 there, 0.1 now" in message
    assert "loop.seed: 0 there, 3 now" in message
    assert "data.sources.x.paths: 'absent' there, ['a'] now" in message
    assert (tmp_path / "config.yaml").read_bytes() == frozen
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_checkpoints_that_nothing_describes_are_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_00000030").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds checkpoints but no config\.yaml"):
        run_folder.claim(tmp_path, config(tmp_path))
    assert not (tmp_path / "config.yaml").exists()


def test_steps_that_nobody_set_are_put_down_to_the_data(tmp_path: Path) -> None:
    """Such is the config once epochs are settled, and once more on data that has grown."""
    run_folder.claim(tmp_path, config(tmp_path, "loop.epochs=3", "loop.max_steps=100"))
    with pytest.raises(
        ConfigError, match=r"max_steps: 100 there, 120 now\n.*the data, .*has changed"
    ):
        run_folder.claim(tmp_path, config(tmp_path, "loop.epochs=3", "loop.max_steps=120"))


def test_machine_and_rhythm_may_change_between_lives(tmp_path: Path) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    words = ["cluster.gpus_per_node=2", "engine=zero3", "loop.micro_batch_size=2",
             "loop.save_every=5", "loop.keep_last=1", "log.tensorboard=true"]  # fmt: skip
    changed = config(tmp_path, *words)
    changes = run_folder.claim(tmp_path, changed)
    assert changes["engine.zero_stage"] == [2, 3] and changes["cluster.gpus_per_node"] == [1, 2]
    assert len(changes) == len(words)
    assert load_config(run_folder.read(tmp_path / "config.yaml")) == changed


def test_one_refused_key_beside_allowed_ones_changes_nothing(tmp_path: Path) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    with pytest.raises(ConfigError) as caught:
        run_folder.claim(tmp_path, config(tmp_path, "engine=zero3", "loop.seed=1"))
    assert "zero_stage" not in str(caught.value)
    assert run_folder.read(tmp_path / "config.yaml")["engine"]["zero_stage"] == 2


def test_max_steps_may_grow_only_where_no_learning_rate_depends_on_it(tmp_path: Path) -> None:
    constant, cosine = tmp_path / "constant", tmp_path / "cosine"
    run_folder.claim(constant, config(constant, "schedule=constant"))
    longer = config(constant, "schedule=constant", "loop.max_steps=200")
    assert run_folder.claim(constant, longer) == {"loop.max_steps": [100, 200]}
    run_folder.claim(cosine, config(cosine))
    with pytest.raises(ConfigError, match=r"loop\.max_steps: 100 there, 200 now"):
        run_folder.claim(cosine, config(cosine, "loop.max_steps=200"))


def test_a_moved_run_folder_is_the_same_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run_folder.claim(old, config(old))
    old.rename(new)
    assert run_folder.claim(new, config(new)) == {}


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00"])
def test_damaged_frozen_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        run_folder.claim(tmp_path, config(tmp_path))


def test_unwritable_run_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"  # a path that not even root can write
    with pytest.raises(StorageError) as caught:
        run_folder.claim(run_dir, config(run_dir))
    assert f"run_dir={run_dir} cannot be written" in str(caught.value)


def test_full_disk_is_an_error_and_leaves_the_old_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StorageError, match="No space left on device"):
        run_folder.claim(tmp_path, config(tmp_path, "engine=zero3"))
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_every_life_is_recorded(tmp_path: Path) -> None:
    run_folder.record_life(tmp_path, "plain", 1, {})
    run_folder.record_life(tmp_path, "slurm", 4, {"engine.zero_stage": [2, 3]})
    lines = (tmp_path / "lives.jsonl").read_text(encoding="utf-8").splitlines()
    lives = [json.loads(line) for line in lines]
    assert [life["world_size"] for life in lives] == [1, 4]
    assert lives[1]["launcher"] == "slurm" and lives[1]["changes"] == {"engine.zero_stage": [2, 3]}


def test_a_key_newer_than_the_frozen_config_had_its_default(tmp_path: Path) -> None:
    run_folder.claim(tmp_path, config(tmp_path))
    frozen = run_folder.read(tmp_path / "config.yaml")
    del frozen["data"]["isolate_documents"], frozen["optim"]["eps"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(frozen))
    assert run_folder.claim(tmp_path, config(tmp_path)) == {}
    assert "isolate_documents" in run_folder.read(tmp_path / "config.yaml")["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(frozen))
    with pytest.raises(ConfigError, match=r"data\.isolate_documents: True there, False now"):
        run_folder.claim(tmp_path, config(tmp_path, "data.isolate_documents=false"))


def test_a_stages_newer_field_had_its_default_too(tmp_path: Path) -> None:
    whole = run_folder.plain(config(tmp_path, "stage=sft"))
    whole["stage"] = complete_section(whole["stage"])
    run_folder.claim(tmp_path, load_config(whole))
    old = run_folder.read(tmp_path / "config.yaml")
    del old["stage"]["neftune_alpha"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    same, noisy = load_config(whole), load_config(whole)
    noisy.stage["neftune_alpha"] = 5.0
    check = run_folder.check_same_run
    assert check(tmp_path, same, complete_section) == {}
    with pytest.raises(ConfigError, match=r"neftune_alpha: 0\.0 there, 5\.0 now"):
        check(tmp_path, noisy, complete_section)
    assert check(tmp_path, noisy) == {}  # a login node leaves it to the ranks
    old["stage"]["neftune_alpha"] = 1.0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    silent = load_config({**whole, "stage": {"name": "sft"}})
    assert check(tmp_path, silent) == {}  # nor does it know what is meant by nothing
    with pytest.raises(ConfigError, match=r"neftune_alpha: 1\.0 there, 5\.0 now"):
        check(tmp_path, noisy)


def test_a_submitted_config_is_settled_by_its_first_life_only(tmp_path: Path) -> None:
    words = ["loop.epochs=3", "loop.max_steps=0"]
    asked, settled = config(tmp_path, *words), config(tmp_path, words[0], "loop.max_steps=100")
    run_folder.claim(tmp_path, asked)
    assert run_folder.claim(tmp_path, settled, asked) == {}
    assert run_folder.read(tmp_path / "config.yaml")["loop"]["max_steps"] == 100
    run_folder.record_life(tmp_path, "slurm", 2, {})
    assert run_folder.claim(tmp_path, settled, asked) == {}
    grown = config(tmp_path, words[0], "loop.max_steps=120")
    with pytest.raises(ConfigError, match="max_steps: 100 there, 120 now"):
        run_folder.claim(tmp_path, grown, asked)
