"""The same batches on Ray: embedded, on a local cluster of two nodes, with killed workers and a killed driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_child import Writer, jobs_in
from lipstream.batch.rays import RayScheduler
from lipstream.batch.run import BatchConfig, run_jobs
from lipstream.batch.state import StateFile
from test_batch import CHILD, Unusable, check_diary, diary, starts

ray = pytest.importorskip("ray", reason="pip install 'lipstream[ray]'")


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_tests() -> Iterator[None]:
    """Ray's workers import what they run by name, so they must find this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


def run_with_a_kill(folder: Path, scheduler: RayScheduler, count: int) -> int:
    """Run jobs and kill the worker of the third one that begins; the killed process."""
    killed: list[int] = []

    def kill() -> None:
        while starts(folder) < 3:
            time.sleep(0.01)
        killed.append(int([line for line in diary(folder) if line[0] == "start"][2][2]))
        os.kill(killed[0], signal.SIGKILL)

    (folder / "log").touch()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    jobs = jobs_in(folder, count)
    with StateFile(folder / "report.jsonl", [job.id for job in jobs]) as state, scheduler:
        summary = run_jobs(jobs, scheduler, Writer(folder / "log", 0.4), state, BatchConfig(retries=2))
    thread.join()
    assert summary.failed == {}
    return killed[0]


def test_two_nodes_and_a_killed_worker(tmp_path: Path) -> None:
    """A cluster is reached by its address; both nodes work; a dead worker costs one attempt. About 15 s: Ray starts."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        killed = run_with_a_kill(tmp_path, RayScheduler(2, cluster.address), 6)
    finally:
        ray.shutdown()
        cluster.shutdown()
    check_diary(tmp_path, 6)
    assert sum(line[0] == "load" for line in diary(tmp_path)) == 3, "two workers, and one in the place of the dead one"
    begun = [line[1] for line in diary(tmp_path) if line[0] == "start"]
    (lost,) = {line[1] for line in diary(tmp_path) if line[0] == "start" and line[2] == str(killed)} & {
        name for name in begun if begun.count(name) == 2
    }
    assert lost


def test_embedded_ray_continues_what_processes_began_and_a_killed_driver_lost_nothing(tmp_path: Path) -> None:
    """One state file, whatever ran the jobs. About 15 s: Ray starts."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHILD.parent), os.environ.get("PYTHONPATH", "")])}
    (tmp_path / "log").touch()
    for kind, wanted in (("processes", 3), ("ray", 6)):
        command = [sys.executable, str(CHILD), str(tmp_path), "14", "0.3", "2", kind]
        with subprocess.Popen(command, env=environment) as process:
            while starts(tmp_path) < wanted and process.poll() is None:
                time.sleep(0.01)
            process.kill()
    command[-1] = "ray"
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
    check_diary(tmp_path, 14)


def test_ray_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Ray cluster 127\.0\.0\.1:1: cannot be reached"):
        RayScheduler(1, "127.0.0.1:1")
    jobs = jobs_in(tmp_path, 1)
    with (
        pytest.raises(ValueError, match="unknown model 'x'"),
        StateFile(tmp_path / "report.jsonl", [job.id for job in jobs]) as state,
        RayScheduler(1) as scheduler,
    ):
        run_jobs(jobs, scheduler, Unusable(), state)
