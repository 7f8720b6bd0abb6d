"""What a command of `tmkd` is; each is one file in this package, registered by its name."""

import argparse
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import read_config
from tmkd_ray.registry import Registry

if TYPE_CHECKING:
    from tmkd_ray.stages.experiment import Experiment


class Command(ABC):
    """One command. What takes seconds to load (Ray, the stages) is imported where it is used, not above.

    Attributes:
        description: one line for the help.
        computes: whether it is work for a cluster, and so has a script in `pipelines/` for `ray job submit`.
        open_end: the argument, if there is one, that also takes what stands behind a later option.
    """

    description: ClassVar[str]
    computes: ClassVar[bool] = False
    open_end: ClassVar[str] = "overrides"

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    @abstractmethod
    def __call__(self, options: argparse.Namespace) -> int:
        """Run with the parsed arguments; return the exit code.

        Raises:
            UserError: something that a user can mend.
        """


class ConfigCommand(Command):
    """A command on an experiment: `--config FILE path=value …`."""

    computes = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser)

    def __call__(self, options: argparse.Namespace) -> int:
        self.run(read_config(options.config, options.overrides), options)
        return 0

    @abstractmethod
    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        """Run on a configuration."""


COMMANDS: Registry[type[Command]] = Registry("command")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--config FILE` and the overrides behind it."""
    parser.add_argument("--config", metavar="FILE", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="override, as training.epochs=20")


def checked_experiment(config: ExperimentConfig) -> "Experiment":
    """Open an experiment and check all that a whole run needs, before it starts.

    Raises:
        UserError: data, a network, or an earlier store is missing or does not fit.
    """
    from tmkd_ray.stages.experiment import (
        check_student,
        check_text_teacher,
        check_visual_teacher,
        open_experiment,
    )
    from tmkd_ray.stages.knowledge import check_store

    experiment = open_experiment(config)
    check_store(experiment)
    check_visual_teacher(experiment)
    check_text_teacher(experiment)
    check_student(experiment)
    return experiment
