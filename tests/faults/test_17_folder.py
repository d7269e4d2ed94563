"""Row 17: on some nodes the run's folder is read-only, or another disk's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cluster import Cluster
from cluster_runs import Runs
from probe_runs import RUN, by_hand, rank_variables, words

from trainer.errors import StorageError
from trainer.lives import read_lives

READ_ONLY = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"
ANOTHER = "mount -t tmpfs tmpfs {0}"


@pytest.mark.faults(row=17)
@pytest.mark.slurm
@pytest.mark.slow
def test_every_node_without_the_folder_is_named_before_the_ranks_start(
    runs: Runs, cluster: Cluster, tmp_path: Path
) -> None:
    if cluster.variant == "simple":
        pytest.skip("nodes that share their mounts see the same folder")
    cluster.wait_until_idle()
    for node, mount in {"n2": READ_ONLY, "n3": ANOTHER}.items():
        cluster.machines[node].call("sh", "-c", mount.format(tmp_path))
    try:
        run_dir = tmp_path / "run"
        shown = cluster.wait(runs.submit(runs.values(run_dir, nodes=4)), "FAILED")
    finally:
        for node in ("n2", "n3"):
            cluster.machines[node].call("umount", tmp_path)
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", f"{StorageError.exit_code}:0")
    [life] = read_lives(run_dir)
    assert (life["exit_code"], life["decision"]) == (StorageError.exit_code, "give up")
    reason = life["reason"]
    assert "started" not in life and not list((run_dir / "logs").glob("rank_*"))
    assert f"n2: cannot write into {run_dir}/logs" in reason
    assert f"n3: {run_dir}/logs is another folder there than on the first node" in reason
    assert "n1" not in reason and "n4" not in reason
    assert reason in Path(shown["StdOut"]).read_text()


@pytest.mark.faults(row=17)
@pytest.mark.slow
def test_ranks_name_the_nodes_that_cannot_use_the_folder(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, unshare: apt-get install util-linux")
    command = [*RUN, *words(tmp_path / "run", num_ranks=4)]
    mounts = ["true", READ_ONLY, ANOTHER, "true"]
    inside = [
        ["unshare", "--mount", "sh", "-c", f'{mount.format(tmp_path)} && exec "$@"', "sh", *command]
        for mount in mounts
    ]
    places = rank_variables(4)
    for number, place in enumerate(places):
        place["SLURMD_NODENAME"] = f"n{number}"
    for code, output in by_hand(places, inside):
        assert code == StorageError.exit_code, output
        assert f"run_dir={tmp_path}/run cannot be used on every node" in output
        assert "n1: cannot be written (Read-only file system)" in output
        assert "n2: another folder is there than on rank 0's node, or none" in output
        assert "n0" not in output and "n3" not in output


@pytest.mark.faults(row=17)
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    [(code, output)] = by_hand([{}], [[*RUN, *words(tmp_path / "runs" / "mine", num_ranks=1)]])
    assert code == StorageError.exit_code, output
    assert f"run_dir={tmp_path}/runs/mine cannot be written: [Errno 20]" in output
    assert "Traceback" not in output
