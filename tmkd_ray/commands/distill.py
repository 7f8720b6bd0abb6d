"""`tmkd distill` and `tmkd evaluate`: train the students, measure what is there."""

import argparse

from tmkd_ray.commands.base import COMMANDS, ConfigCommand
from tmkd_ray.config import ExperimentConfig


@COMMANDS.register("distill")
class Distill(ConfigCommand):
    description = "train the students from the knowledge store"

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.distillation import distill, student_jobs
        from tmkd_ray.stages.experiment import check_student, check_text_teacher, open_experiment
        from tmkd_ray.stages.session import ray_session

        experiment = open_experiment(config)
        check_text_teacher(experiment)
        check_student(experiment)
        student_jobs(experiment)  # refuses a store that is missing or lacks what a method needs
        with ray_session(config):
            experiment.save_config()
            students = distill(experiment)
        for student in students:
            print(
                f"{student.path}\n{student.method} seed {student.seed}: validation accuracy "
                f"{100 * student.outcome.validation_accuracy:.2f} % (epoch {student.outcome.best_epoch})"
            )


@COMMANDS.register("evaluate")
class Evaluate(ConfigCommand):
    description = "measure the teachers and students that are there"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--split", choices=("test", "validation"), default="test")

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.evaluation import format_measured, found_networks, measure
        from tmkd_ray.stages.experiment import check_text_teacher, check_visual_teacher, open_experiment
        from tmkd_ray.stages.session import ray_session

        experiment = open_experiment(config)
        check_visual_teacher(experiment)
        check_text_teacher(experiment)
        networks = found_networks(experiment)
        with ray_session(config):
            print(format_measured(measure(experiment, networks, options.split)))
