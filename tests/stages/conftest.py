"""One local Ray for all tests of the stages."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with four logical CPUs, which the stages use as they find it."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"  # else a token file appears in the home folder
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()
