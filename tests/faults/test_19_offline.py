"""Row 19: a node that reaches no network. What a run lacks is named at once; nothing waits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from probe_runs import ROOT

from tokenizer.hub import how_to_fetch

LONGEST_S = 20.0  # a name server that does not answer alone takes longer
CHILD = """
import json, os, sys, time
from launch import run
from trainer.errors import KuroshioError

found, before = [], dict(os.environ)
for words in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(before)  # a run says there which rank it is
    start = time.monotonic()
    try:
        code, said = run.main(words), ""
    except KuroshioError as error:
        code, said = error.exit_code, str(error)
    found.append([code, said, time.monotonic() - start])
print(json.dumps(found))
"""
FETCH = "where there is internet, `hf download {}"


@pytest.mark.faults(row=19)
@pytest.mark.slow
def test_what_is_missing_is_named_before_anything_waits(
    english_tokenizer: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare, ip: apt-get install util-linux iproute2")
    own = f"tokenizer.path={english_tokenizer}"
    cases = {  # what is given -> what is said of it
        ("model=folder", "model.path=org/model"): (78, "model.path=org/model", "org/model"),
        ("tokenizer.path=org/letters",): (78, "tokenizer path org/letters", "org/letters"),
        (own, "data=files", "data.sources.text.paths=[org/texts]"): (
            65, "'org/texts' matches no file", "org/texts --repo-type dataset",
        ),
        (own, "model=folder", f"model.path={tmp_path}/gone"): (78, f"{tmp_path}/gone", ""),
        (own, "data=files", f"data.sources.text.paths=[{tmp_path}/gone.jsonl]"): (
            65, "gone.jsonl' matches no file", "",
        ),
    }  # fmt: skip
    common = ["stage=pretrain", "data=samples", "model=tiny", f"data.store_dir={tmp_path}/store"]
    common += [f"run_dir={tmp_path}/run", "cluster.gpus_per_node=1"]
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable,
         "-c", CHILD],
        input=json.dumps([[*common, *words] for words in cases]), text=True, capture_output=True,
        cwd=ROOT, timeout=300,
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"},  # nobody has said so
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for (code, said, seconds), (words, expected) in zip(results, cases.items(), strict=True):
        wanted_code, wanted, name = expected
        assert code == wanted_code and wanted in said, (words, code, said)
        assert (FETCH.format(name) in said) if name else ("hf download" not in said), said
        assert seconds < LONGEST_S, (words, seconds)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["/abs/olute", "a", "./a/b", "a/b/c", "../b", "a b/c"])
def test_a_path_is_no_name_on_a_hub(path: str) -> None:
    assert how_to_fetch(path) == ""


def test_a_folder_that_is_there_is_no_name_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download org/name --local-dir" in how_to_fetch("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert how_to_fetch("org/name") == ""
