"""`tmkd run` and `tmkd demo`: the whole road."""

import argparse
import importlib.resources
import os

from tmkd_ray.commands.base import COMMANDS, ConfigCommand, checked_experiment
from tmkd_ray.config import ExperimentConfig


@COMMANDS.register("run")
class Run(ConfigCommand):
    description = "the whole road: teachers, knowledge, students, evaluation, report"

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.run import run
        from tmkd_ray.stages.session import ray_session

        experiment = checked_experiment(config)
        with ray_session(config):
            run(experiment)


@COMMANDS.register("demo")
class Demo(Run):
    description = "the whole road on scikit-learn's handwritten digits, in minutes"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.set_defaults(config=demo_config())


def demo_config() -> str:
    """Return the path of the demo's configuration."""
    return os.fspath(importlib.resources.files("tmkd_ray") / "demo.yaml")  # type: ignore[call-overload, no-any-return]
