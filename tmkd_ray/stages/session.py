"""Join or start Ray, without its noise."""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator

import ray
from ray._private import ray_constants

from tmkd_ray.config import ClusterConfig, ExperimentConfig

_settings = ClusterConfig()
"""Of the cluster this process is connected to; as global as that connection."""


def ray_session(config: ExperimentConfig) -> contextlib.AbstractContextManager[None]:
    """Be connected to Ray within: the cluster of the job we run in, one named in the config, or a local one.

    A Ray that was there before is left as it was; a local one started here ends with the block.
    """
    return cluster_session(config.cluster, _logical_cpus(config))


@contextlib.contextmanager
def cluster_session(cluster: ClusterConfig, local_cpus: int) -> Iterator[None]:
    """The same; a local Ray counts `local_cpus` CPUs where the configuration does not say."""
    use_cluster_settings(cluster)
    if ray.is_initialized():
        yield
        return
    in_job = "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job or cluster.address is not None:
        with _native_stderr_closed():
            ray.init(address=cluster.address or "auto", logging_level="error", log_to_driver=False)
    else:
        start_local_ray(cluster.num_cpus or local_cpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C mean KeyboardInterrupt within and afterwards, whatever Ray Train does with it.

    `fit` puts a handler of its own in place, which ends the run and the driver without a word, and leaves it
    there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        raise KeyboardInterrupt from end
    finally:
        signal.signal(signal.SIGINT, before)


def _logical_cpus(config: ExperimentConfig) -> int:
    """Return how many CPUs a local Ray counts: what is asked for must fit, on few cores too."""
    # Ray Data's own tasks need a CPU beside the actors.
    cpus = max(4, 2 * (os.cpu_count() or 1))
    streams = config.knowledge.mode == "cached" and config.knowledge.loader == "streaming"
    if streams or config.knowledge.mode == "streaming":
        workers = config.training.num_workers * config.training.num_cpus_per_worker
        pools = (config.knowledge.views, config.knowledge.visual, config.knowledge.text)
        cpus = max(cpus, math.ceil(1 + workers + sum(pool.max_size * pool.num_cpus for pool in pools)))
    return cpus


def start_local_ray(num_cpus: int) -> None:
    """Start a Ray of our own that listens on loopback alone, and connect to it."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else can reach it; else a token file is written
    # Ray has no option for this; off Linux it is the default. The variable is for the processes it starts, the
    # constant for this one, which has read the variable already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    for is_last in (False, True):
        try:
            with _native_stderr_closed():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level="error",
                    log_to_driver=False,
                )
            return
        except Exception as error:
            # Ray gives its own processes 30 s, which is short on a machine that is busy; there is no option.
            if is_last or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drop what Ray's native code prints while it starts: that it has read its log level. Failures raise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cluster_settings() -> ClusterConfig:
    """Return what the configuration says of the cluster that this process is connected to."""
    return _settings


def use_cluster_settings(settings: ClusterConfig) -> None:
    """Let `cluster_settings` return this; for the workers of a training, which `ray_session` does not see."""
    global _settings
    _settings = settings


def num_gpus() -> float:
    """Return the number of GPUs the cluster has now, or can grow to if it is said to autoscale."""
    return max(float(ray.cluster_resources().get("GPU", 0)), float(cluster_settings().max_gpus or 0))
