"""The import rule: who may import whom, read from the sources with ``ast``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rule's table: parts from the bottom layer up. A part is a package or a module.
LAYERS: list[list[str]] = [
    [
        "trainer.losses",
        "trainer.plan",
        "trainer.errors",
        "trainer.config",
        "trainer.deadline",
        "trainer.disk",
        "trainer.faults",
        "trainer.heartbeat",
        "trainer.lease",
        "trainer.lives",
        "tokenizer",
    ],
    ["trainer.data", "trainer.models", "trainer.engine", "trainer.metrics"],
    [
        "trainer.stage",
        "trainer.numerics",
        "trainer.roll_back",
        "trainer.signals",
        "trainer.watchdog",
        "trainer.environment",
        "trainer.inference",
        "trainer.sequence_logps",
    ],
    ["trainer.model_parts", "trainer.rollout", "trainer.train_stage"],
    [
        "trainer.loop",
        "trainer.policy",
        "trainer.inputs",
        "trainer.held_out",
        "trainer.length",
        "trainer.preference_data",
        "trainer.reference_cache",
        "trainer.sample_answers",
    ],
    ["trainer.store_stage", "trainer.reference"],
    ["trainer.next_token"],
    ["trainer.stages"],
    ["launch"],
]
DATA_FOLDERS = ["reading", "chats", "prepared", "batches"]  # each imports from those before it only
BOTTOM_MAY_IMPORT = "trainer.errors"  # the one module that its own layer may use
DOORS = {  # library -> the only module that imports it
    "deepspeed": "trainer.engine.engine",
    "wandb": "trainer.metrics.sinks",
    "mpi4py": "launch.rendezvous",
    "hydra": "launch.compose",
}
ONLY_LIBRARIES: dict[str, set[str]] = {
    "trainer.losses": {"torch"},
    "trainer.plan": set(),
    # What login nodes and the end of a job read.
    "trainer.deadline": set(),
    "trainer.disk": set(),
    "trainer.faults": set(),
    "trainer.heartbeat": set(),
    "trainer.lease": set(),
    "trainer.lives": set(),
}
PROJECT = ("launch", "trainer", "tokenizer")


def project_sources() -> dict[str, str]:
    """Return the source of every module of the project by dotted name."""
    sources = {}
    for package in PROJECT:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def imports(name: str, source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Yield the modules that ``source`` imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base


def part_of(module: str) -> str | None:
    """Return the part of the table that ``module`` belongs to."""
    parts = [part for layer in LAYERS for part in layer]
    return next((p for p in parts if module == p or module.startswith(f"{p}.")), None)


def layer_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for every import in ``sources`` that breaks the rule."""
    lines = []
    for name, source in sources.items():
        for target in imports(name, source, sources):
            reason = refuse(name, target)
            if reason:
                lines.append(f"{name} imports {target}: {reason}")
    return sorted(set(lines))


def refuse(name: str, target: str) -> str | None:
    """Return why module ``name`` must not import ``target``, or None if it may."""
    library = target.partition(".")[0]
    if library in PROJECT:
        return refuse_project(name, target)
    if library in DOORS and name != DOORS[library]:
        return f"only {DOORS[library]} imports {library}"
    part = part_of(name)
    if part in ONLY_LIBRARIES and library not in ONLY_LIBRARIES[part] | sys.stdlib_module_names:
        return f"{part} stays free of {library}"
    return None


def refuse_project(name: str, target: str) -> str | None:
    mine, theirs = part_of(name), part_of(target)
    if mine is None or theirs is None:
        return "it is in no layer of the table"
    if mine == theirs == "trainer.stages" and "trainer.stages" not in (name, target):
        return "stages do not import each other"
    if mine == theirs or layer_of(theirs) < layer_of(mine):
        return None
    if layer_of(mine) == 0 and target == BOTTOM_MAY_IMPORT:
        return None
    return f"{theirs} is not below {mine}"


def find_cycle(sources: Mapping[str, str]) -> list[str]:
    """Return the modules of an import cycle, or an empty list."""
    graph = {
        name: {t for t in imports(name, source, sources) if t in sources and t != name}
        for name, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_project_follows_the_import_rule() -> None:
    sources = project_sources()
    assert len(sources) > 20
    assert violations(sources) == []


def data_folder(module: str) -> int | None:
    """Return the place of a module's folder in ``DATA_FOLDERS``, None for other modules."""
    parts = module.split(".")
    is_inside = parts[:2] == ["trainer", "data"] and len(parts) > 2 and parts[2] in DATA_FOLDERS
    return DATA_FOLDERS.index(parts[2]) if is_inside else None


def test_folders_of_data_import_from_those_before_them() -> None:
    sources = project_sources()
    inside = {name: data_folder(name) for name in sources if data_folder(name) is not None}
    assert set(inside.values()) == set(range(len(DATA_FOLDERS)))
    for name, mine in inside.items():
        for target in imports(name, sources[name], sources):
            theirs = data_folder(target)
            assert theirs is None or theirs <= mine, f"{name} imports {target}"


def test_project_has_no_import_cycle() -> None:
    assert find_cycle(project_sources()) == []


def test_every_door_is_used() -> None:
    sources = project_sources()
    for library, door in DOORS.items():
        used = {target.partition(".")[0] for target in imports(door, sources[door], sources)}
        assert library in used, f"{door} no longer imports {library}; shorten the table"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trainer.loop", "from trainer.stages import STAGES"),
        ("trainer.stage", "from trainer.loop import fit"),
        ("trainer.engine.engine", "import trainer.data.batches.loader"),
        ("trainer.data.batches.loader", "def late():\n    from launch import run"),
        ("trainer.stages.sft", "from trainer.stages.pretrain import Pretrain"),
        ("trainer.models.load", "import deepspeed.zero"),
        ("launch.local", "from mpi4py import MPI"),
        ("trainer.losses.dpo", "import transformers"),
        ("trainer.losses.dpo", "from trainer.config import build"),
        ("trainer.plan.memory", "import torch"),
        ("tokenizer.merge", "from trainer.config import build"),
        ("trainer.serving.generate", "from trainer.errors import DataError"),
    ],
)
def test_rule_catches(name: str, source: str) -> None:
    known = dict.fromkeys(["trainer.loop", "trainer.stage", "trainer.data.batches.loader"], "")
    assert len(violations({**known, name: source})) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trainer.stages.sft", "from trainer.loop import fit\nfrom trainer.stage import Stage"),
        ("tokenizer.merge", "from trainer.errors import DataError\nfrom tokenizer import load"),
        ("trainer.losses.dpo", "import math\nimport torch"),
        ("launch.rendezvous", "def late():\n    from mpi4py import MPI"),
    ],
)
def test_rule_allows(name: str, source: str) -> None:
    assert violations({name: source}) == []


def test_cycle_is_found_also_through_a_lazy_import() -> None:
    sources = {
        "trainer.data.a": "import trainer.data.b",
        "trainer.data.b": "def late():\n    from trainer.data import a",
    }
    assert set(find_cycle(sources)) == {"trainer.data.a", "trainer.data.b"}
