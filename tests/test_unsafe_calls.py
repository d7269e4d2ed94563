"""What no source of the project may do, read with ``ast``: unpickle, evaluate text, run a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("launch", "trainer", "tokenizer", "samples", "benchmarks")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OBJECT_COLLECTIVES = {  # of torch.distributed: each unpickles what another rank sends
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
PICKLING_MPI = {"bcast", "gather", "allgather", "scatter", "send", "recv", "alltoall", "isend"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
LOADERS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
RUN_OTHERS_CODE = {  # module -> why code that is named by data runs there
    "launch/__main__.py": "the verb's module, from a table",
    "trainer/stages/__init__.py": "the stage's module, from a table",
    "trainer/rollout/rewards.py": "a user's rule, whose file the config names",
}
NAMED_CODE = {
    "importlib.import_module", "importlib.util.module_from_spec", "runpy.run_module",
    "runpy.run_path", "hydra.utils.instantiate", "hydra.utils.get_class", "hydra.utils.call",
    "instantiate",
}  # fmt: skip
OWN_PICKLES = {  # module -> why it unpickles what it has just written itself
    "benchmarks/checkpoint.py": "torch.save is measured beside our checkpoints",
}
# transformers renders chat templates, which come with models, in a sandbox of its own.
OWN_TEMPLATES = {
    "launch/cards.py", "launch/slurm.py", "trainer/metrics/page.py",
    "tokenizer/audit_page.py",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` of a name or attribute; any other expression is ``()``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {word.arg: word.value for word in call.keywords if word.arg}


def is_constant(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def refuse_call(path: str, call: ast.Call) -> Iterator[str]:
    """Yield why a call has no place in the project."""
    name, given = dotted(call.func), keywords(call)
    last = name.rpartition(".")[2]
    is_own = path in OWN_PICKLES and is_constant(given.get("weights_only"), True)
    if (name in LOADERS and not is_own) or last == "read_pickle":
        yield f"{name} unpickles"
    if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
        yield f"{name} unpickles"
    if last in OBJECT_COLLECTIVES:
        yield f"{name} unpickles what another rank sends"
    if last in PICKLING_MPI and "communicator" in name:
        yield f"{name} pickles; its namesake with a capital sends bytes"
    if name in EVALUATORS:
        yield f"{name} runs text as code"
    if name in SHELLS or ("shell" in given and not is_constant(given["shell"], False)):
        yield f"{name} starts a shell"
    if name in NAMED_CODE and path not in RUN_OTHERS_CODE:
        yield f"{name} runs code that data name"
    if last == "Environment" and path not in OWN_TEMPLATES:
        yield f"{name}: templates of models belong in transformers' sandbox"
    if name.startswith("Auto") and last == "from_pretrained" and path.startswith("trainer/"):
        if not is_constant(given.get("local_files_only"), True):
            yield f"{name} without local_files_only=True may fetch a folder's namesake"
        if "trust_remote_code" not in given:
            yield f"{name} without trust_remote_code asks on a terminal whether to run code"


def problems(path: str, source: str) -> list[str]:
    """Return what is wrong in a source, with its lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [f"{path}:{node.lineno}: {reason}" for reason in refuse_call(path, node)]
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            error_only = [alias.name for alias in node.names] == ["UnpicklingError"]
            names = [] if error_only else [node.module or ""]
        bad = UNPICKLERS.intersection(name.partition(".")[0] for name in names)
        found += [f"{path}: imports {name}, which unpickles" for name in sorted(bad)]
    return found


def test_no_source_unpickles_evaluates_or_runs_a_shell() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = []
    for path in sources:
        found += problems(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert found == []


def test_no_source_uses_object_collectives() -> None:
    """Also not by another name: the words do not occur at all."""
    for package in ("launch", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            found = [word for word in OBJECT_COLLECTIVES if word in path.read_text("utf-8")]
            assert not found, f"{path}: {found}"


def test_allowances_are_used() -> None:
    """An entry that nothing needs would allow what nobody has looked at."""
    for path in [*RUN_OTHERS_CODE, *OWN_TEMPLATES, *OWN_PICKLES]:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert problems("elsewhere.py", source), f"{path} needs no allowance any more"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "from pickle import UnpicklingError, loads",
        "def late():\n    import cloudpickle.loads",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "pandas.read_pickle(path)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "dist.all_gather_object(found, mine)",
        "self.communicator.bcast(place)",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=wanted)",
        "hydra.utils.instantiate(config)",
        "importlib.import_module(name)",
        "jinja2.Environment().from_string(template)",
        "AutoConfig.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, local_files_only=True)",
    ],
)
def test_rule_catches(source: str) -> None:
    assert len(problems("trainer/new.py", source)) in (1, 2)


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path, mmap_mode='r')",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "from pickle import UnpicklingError",
        "model.eval()",
        "re.compile(text)",
        "subprocess.run(['sbatch', script], shell=False)",
        "communicator.Bcast(place)",
        "AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)",
    ],
)
def test_rule_allows(source: str) -> None:
    assert problems("trainer/new.py", source) == []
