"""`tmkd ablate`: what each part of TMKD is worth."""

import argparse

from tmkd_ray.commands.base import COMMANDS, ConfigCommand, checked_experiment
from tmkd_ray.config import ExperimentConfig


@COMMANDS.register("ablate")
class Ablate(ConfigCommand):
    description = "leave out each part of TMKD in turn, over strategies and seeds; one table"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--strategies",
            metavar="NAME,NAME",
            help="distillation strategies to do it with; default: the config's",
        )

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.ablation import ablate, ablation_config
        from tmkd_ray.stages.session import ray_session

        strategies = None if options.strategies is None else options.strategies.split(",")
        experiment = checked_experiment(ablation_config(config, strategies))
        with ray_session(experiment.config):
            ablate(experiment)
