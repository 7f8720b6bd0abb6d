"""Join or start Ray, without its noise."""

import contextlib
import os
from collections.abc import Iterator

import ray

from tmkd_ray.config import ClusterConfig


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray within: the cluster of the job we run in, one named in the config, or a local one.

    A Ray that was there before is left as it was; a local one started here ends with the block.
    """
    if ray.is_initialized():
        yield
        return
    in_job = "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    quiet = {"logging_level": "error", "log_to_driver": False}
    if in_job or config.address is not None:
        ray.init(address=config.address or "auto", **quiet)
    else:
        # Ray Data's own tasks need a CPU beside the actors: on few cores, count more than there are.
        cpus = config.num_cpus or max(4, 2 * (os.cpu_count() or 1))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def num_gpus() -> float:
    """Return the number of GPUs the cluster has now."""
    return float(ray.cluster_resources().get("GPU", 0))
