"""Every run of a pipeline, composed and checked before its first step begins."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.compose import compose_values
from launch.graph import lineage
from launch.graph.definition import ExportOptions, Pipeline, Step, TokenizerOptions
from trainer.config import SourceConfig, load_config
from trainer.data.reading.files import list_files
from trainer.errors import ConfigError, DataError
from trainer.stages import SINGLE_PROCESS

Values = dict[str, Any]
VOCAB = "vocab"  # the stage whose run holds plain folders: RUN/model, RUN/tokenizer


def compose_runs(pipeline: Pipeline) -> dict[str, Values]:
    """Compose every run of ``pipeline`` and check it as far as no parent's output is needed.

    Returns:
        The composed values by step, still without what data and model settle.

    Raises:
        ConfigError: with every problem of every step.
    """
    composed: dict[str, Values] = {}
    problems: list[str] = []
    for step in pipeline.steps.values():
        if step.kind != "run":
            continue
        with _naming(step.name, problems):
            composed[step.name] = _compose(pipeline, step)
    for step in pipeline.steps.values():
        with _naming(step.name, problems):
            _check_parents(pipeline, step, composed)
    if problems:
        raise ConfigError("\n".join(problems))
    return composed


def check_sources(pipeline: Pipeline, composed: Mapping[str, Values]) -> None:
    """Look whether the files are there that the runs will read hours later.

    Raises:
        ConfigError: with every path that leads nowhere.
    """
    problems: list[str] = []
    for name, values in composed.items():
        if lineage.is_complete(pipeline.folder, name):
            continue
        for key, source in load_config(values).data.sources.items():
            try:
                list_files(source)
            except DataError as error:
                problems.append(f"step {name}: data.sources.{key}: {error}")
    for step in pipeline.steps.values():
        if isinstance(step.options, TokenizerOptions) and not step.folder.exists():
            try:
                list_files(SourceConfig(step.options.paths))
            except DataError as error:
                problems.append(f"step {step.name}: paths: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def check_stages(pipeline: Pipeline, composed: Mapping[str, Values]) -> None:
    """Check every run's stage as its own start would, which imports torch and takes seconds.

    Models that no step has written yet are stood in for by a folder with the config.json that they
    will have, as far as that follows from the model at the beginning.

    Raises:
        ConfigError: with every problem of every step.
    """
    from launch.validation import build_run

    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kuroshio-") as folder:
        places = _stand_ins(pipeline, composed, Path(folder))
        for name, values in composed.items():
            with _naming(name, problems, {new: old for old, new in places.items()}):
                build_run(replaced(values, places))
    if problems:
        raise ConfigError("\n".join(problems))


def hands_over(step: Step, composed: Mapping[str, Values]) -> str | None:
    """Return the folder in which a step hands a model over; None where there is none."""
    if step.kind == "export":
        return str(step.folder)
    if step.kind == "run" and composed[step.name]["stage"]["name"] == VOCAB:
        return str(step.folder / "model")
    return None


@contextmanager
def _naming(
    name: str, problems: list[str], places: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Note a step's problems under its name."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for shown, meant in (places or {}).items():
            text = text.replace(shown, meant)
        problems += [f"step {name}: {line}" for line in text.splitlines()]


def _compose(pipeline: Pipeline, step: Step) -> Values:
    keys = {word.partition("=")[0].lstrip("+~") for word in step.words}
    if "run_dir" in keys:
        raise ConfigError(f"run_dir: a pipeline decides it ({step.folder}); leave it out")
    words = [*step.words, f"run_dir={step.folder}"]
    if "name" not in keys:
        words.append(f"name={pipeline.name}-{step.name}")
    values = compose_values(words)
    config = load_config(values)
    if config.stage["name"] in SINGLE_PROCESS:
        values["cluster"] |= {"nodes": 1, "gpus_per_node": 1}
    return values


def _check_parents(pipeline: Pipeline, step: Step, composed: Mapping[str, Values]) -> None:
    """Refuse references to what a parent does not write.

    Raises:
        ConfigError: naming the reference.
    """
    if step.kind == "export":
        _check_export(step, pipeline.steps[step.parents[0]], composed)
    if step.name not in composed:
        return
    for key, value in _texts(composed[step.name]):
        for parent in map(pipeline.steps.__getitem__, step.parents):
            if parent.kind == "run" and value == str(parent.folder):
                stage = composed.get(parent.name, {}).get("stage", {}).get("name")
                what = f"@{{{parent.name}}}/model" if stage == VOCAB else "a step that exports it"
                raise ConfigError(f"{key}=@{{{parent.name}}} is a run folder; name {what}")


def _check_export(step: Step, parent: Step, composed: Mapping[str, Values]) -> None:
    options = step.options
    assert isinstance(options, ExportOptions)
    if parent.kind != "run" or options.run != str(parent.folder):
        raise ConfigError(f"export.run={options.run}: expected @{{STEP}} of a run")
    if parent.name not in composed:
        return  # its own problems are named
    values = composed[parent.name]
    if values["stage"]["name"] == VOCAB:
        raise ConfigError(
            f"export.run=@{{{parent.name}}} is a vocabulary run, which writes its model itself; "
            f"name @{{{parent.name}}}/model where this step is named"
        )
    if options.adapter and values["peft"]["mode"] not in ("lora", "qlora"):
        raise ConfigError(
            f"export.adapter=true, but {parent.name} has peft.mode={values['peft']['mode']}; "
            "use peft=lora there"
        )


def _stand_ins(pipeline: Pipeline, composed: Mapping[str, Values], folder: Path) -> dict[str, str]:
    """Write a config.json for every model to come; return its folder by the model's."""
    places: dict[str, str] = {}
    architectures: dict[str, dict[str, Any] | None] = {}
    for step in pipeline.steps.values():
        target = hands_over(step, composed)
        if target is None or (Path(target) / "config.json").is_file():
            continue
        source = step.name if step.kind == "run" else step.parents[0]
        architecture = _architecture(composed[source]["model"], architectures)
        architectures[target] = architecture
        if architecture is not None:
            place = folder / step.name
            place.mkdir()
            (place / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
            places[target] = str(place)
    return places


def _architecture(
    model: Mapping[str, Any], known: Mapping[str, dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Return what config.json of a model made from ``model`` will say; None = cannot be read."""
    path = model["path"]
    if path is None:
        return model["architecture"]
    if path in known:
        return known[path]
    file = Path(path) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def replaced(value: Any, places: Mapping[str, str]) -> Any:
    """Return nested values with texts that name a folder of ``places`` naming the other one."""
    if isinstance(value, dict):
        return {key: replaced(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


def _texts(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text among nested values with its dotted key."""
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    elif isinstance(value, str):
        yield prefix, value
    for key, item in items:
        yield from _texts(item, f"{prefix}.{key}" if prefix else str(key))
