"""One local Ray for all tests of the stages that run in a process."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from tiny_road import TINY, TWO_OF_EACH

import tmkd_ray.stages  # noqa: F401 (sets Ray's environment before Ray is imported)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with four logical CPUs, which the stages use as they find it."""
    import ray

    from tmkd_ray.stages.session import start_local_ray

    start_local_ray(num_cpus=4)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_run(ray_cluster, tmp_path_factory):
    """A finished tiny run; tests that change it work on their own output folder.

    Of several test processes the first computes it and the others take copies.
    """
    from tmkd_ray.cli import main

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-run"
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "tiny" / "results.json").exists():
            shutil.rmtree(shared, ignore_errors=True)  # of a process that failed
            assert main(["run", *TINY, *TWO_OF_EACH, f"output={shared}"]) == 0
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("runs"), dirs_exist_ok=True))


@pytest.fixture(scope="module")
def tiny_copy(tiny_run, tmp_path_factory):
    """The tiny run in a folder of the module's own, for tests that add to it; nothing is fitted again."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("copy") / "runs"))
