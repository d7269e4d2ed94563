"""How a run starts: command line, composition, ranks, jobs.

``__main__.VERBS`` names the module of each verb. What stands behind them:

Configuration  compose, validation, secrets, summary, help, completion, options
Ranks          local, rendezvous, world, node_environment, agreement, rank_log
A run's folder run_folder, snapshot, json_file, file_modes; tenancy: who lives in it
Jobs           submission (config → job), job_folder, slurm and job.sbatch.j2 (job → script),
               sbatch (script → Slurm), slurm_queue, job_end (what comes after the ranks), sweep
Planning       planning, plan_inputs, plan_models, plan_page, plan_pipeline; see trainer.plan
Pipelines      pipeline (here), graph (steps, and as jobs)
Watching       monitor
Doctor         checks
Verifying      verification
Models         loaded_model, terminal_chat; export, final_model, exports, cards
"""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the checkout, or a run's snapshot of it


def check_checkout(root: Path) -> None:
    """Raise ImportError unless ``trainer``, ``tokenizer`` and ``conf`` in ``root`` are in use.

    Packages of the same names exist on PyPI, and a mixture of two checkouts would train with one
    version of the code while recording another.
    """
    for name in ("trainer", "tokenizer"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != root / name / "__init__.py":
            raise ImportError(
                f"package {name!r} resolves to {origin}, not to {root / name}: another package of "
                f"that name comes first; set PYTHONPATH={root} or uninstall the other one"
            )
    if not (root / "conf" / "run.yaml").is_file():
        raise ImportError(
            f"{root}/conf/run.yaml is missing: run from a checkout (or `pip install -e` of it), "
            "not from an installed wheel"
        )


check_checkout(ROOT)
