"""One local Ray for all tests of the stages."""

import shutil
from pathlib import Path

import pytest
from tiny_road import TINY

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
    """A finished tiny run; tests that change it work on their own output folder."""
    from tmkd_ray.cli import main

    output = tmp_path_factory.mktemp("runs")
    assert main(["run", *TINY, f"output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def tiny_copy(tiny_run, tmp_path_factory):
    """The tiny run in a folder of the module's own, for tests that add to it; nothing is fitted again."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("copy") / "runs"))
