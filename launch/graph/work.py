"""The steps that are no runs: a tokenizer, an export; here, or as a job of their own.

``kuroshio run --step DIR STEP`` does what ``DIR/steps/STEP.json`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.graph import lineage
from launch.graph.definition import ExportOptions, TokenizerOptions
from launch.json_file import read_json
from trainer.config import SourceConfig, build
from trainer.errors import CheckpointError, ConfigError


def main(arguments: Sequence[str]) -> int:
    """Do one step of a pipeline, as a job of its own.

    Args:
        arguments: the pipeline's folder and the step's name.

    Raises:
        ConfigError: it cannot be done.
    """
    if len(arguments) != 2:
        raise ConfigError("usage: kuroshio run --step DIR STEP")
    do_step(Path(arguments[0]), arguments[1])
    return 0


def do_step(folder: Path, step: str) -> None:
    """Make the tokenizer or the export that a step's record describes, unless it is there.

    Raises:
        ConfigError: a parent is missing or changed, or the options do not fit it.
    """
    record = read_json(lineage.record_path(folder, step))
    if record is None:
        raise CheckpointError(f"{folder} has no step {step}; start its pipeline again")
    lineage.begin(folder, step)
    if lineage.is_complete(folder, step):
        return
    if record["kind"] == "export":
        _export(_options(ExportOptions, record), folder / step)
    else:
        _make_tokenizer(_options(TokenizerOptions, record), folder, step)


def export_flags(options: ExportOptions) -> list[str]:
    """Return the flags of ``kuroshio export``."""
    flags = [f"--dtype={options.dtype}", f"--base={options.base}"]
    flags.append(f"--max-shard-gb={options.max_shard_gb:g}")
    return flags + (["--adapter"] if options.adapter else [])


def _options(cls: type, record: lineage.Record) -> Any:
    problems: list[str] = []
    options = build(cls, record["options"], "options", problems)
    if options is None:
        raise ConfigError("\n".join(problems))
    return options


def _export(options: ExportOptions, out: Path) -> None:
    from launch import export

    export.main([options.run, str(out), *export_flags(options)])


def _make_tokenizer(options: TokenizerOptions, folder: Path, step: str) -> None:
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base
    from trainer.data.reading.readers import read_documents
    from trainer.data.reading.records import RejectLog
    from trainer.models.aside import written_aside

    source = SourceConfig(options.paths, text_columns=options.text_columns)
    rejects = RejectLog(folder / lineage.RECORDS / f"{step}.rejects.jsonl", 0.01)
    texts = [document.text for document in read_documents(source, step, rejects)]
    with written_aside(folder / step) as place:
        save_tokenizer(train_base(texts, vocab_size=options.vocab_size), place)
