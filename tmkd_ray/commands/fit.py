"""`tmkd fit-teacher` and `tmkd fit-clip`: the teachers that are not given."""

import argparse

from tmkd_ray.commands.base import COMMANDS, ConfigCommand
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.errors import UserError


@COMMANDS.register("fit-teacher")
class FitTeacher(ConfigCommand):
    description = "fit the visual teacher, or adapt a given one to the views"

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.experiment import check_visual_teacher, open_experiment
        from tmkd_ray.stages.fitting import fit_teacher
        from tmkd_ray.stages.session import ray_session

        visual = config.teacher.visual
        if not visual.is_fitted:
            if visual.checkpoint is None:
                raise UserError(
                    f"teacher.visual.model is {visual.model}, which has its weights: nothing to fit"
                )
            raise UserError(f"teacher.visual.checkpoint is {visual.checkpoint}: nothing to fit; set it to null")
        experiment = open_experiment(config)
        check_visual_teacher(experiment)
        with ray_session(config):
            experiment.save_config()
            fitted = fit_teacher(experiment)
        assert fitted.outcome is not None
        print(f"{fitted.path}\nvalidation accuracy {100 * fitted.outcome.validation_accuracy:.2f} %")


@COMMANDS.register("fit-clip")
class FitClip(ConfigCommand):
    description = "fit CLIP on views and prior-aware prompts"

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.stages.experiment import open_experiment
        from tmkd_ray.stages.fitting import fit_clip
        from tmkd_ray.stages.session import ray_session

        if config.teacher.text is None or config.teacher.text.model is not None:
            raise UserError(
                "teacher.text names a model or is null: nothing to fit; set teacher.text.model to null"
            )
        experiment = open_experiment(config)
        with ray_session(config):
            experiment.save_config()
            fitted = fit_clip(experiment)
        assert fitted is not None
        assert fitted.outcome is not None
        print(
            f"{fitted.path}\nzero-shot validation accuracy, mean over views "
            f"{100 * fitted.outcome.validation_accuracy:.2f} %"
        )
