"""The command line: `tmkd COMMAND --config FILE dotted.path=value …`."""

import argparse
import importlib.resources
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tmkd_ray import __version__
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import dump_config, read_config
from tmkd_ray.errors import UserError

if TYPE_CHECKING:
    from tmkd_ray.stages.experiment import Experiment

USER_ERROR = 2
"""Exit code of what a user can mend; a defect of the program shows its traceback and exits with 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = _parser()
    # argparse takes only the first group of overrides; those behind a later option come back as unknown.
    options, overrides = parser.parse_known_args(arguments)
    unknown = [override for override in overrides if override.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += overrides
    try:
        if options.command is _knowledge and options.overrides[:1] in (["show"], ["verify"]):
            return _inspect_store(options.overrides.pop(0), options)
        if getattr(options, "store", None) is not None:
            parser.error("--store goes with `tmkd knowledge show` and `tmkd knowledge verify`")
        config = read_config(options.config, options.overrides)
        command: Callable[[ExperimentConfig, argparse.Namespace], None] = options.command
        command(config, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def demo_config() -> str:
    """Return the path of the demo's configuration."""
    return os.fspath(importlib.resources.files("tmkd_ray") / "demo.yaml")  # type: ignore[call-overload, no-any-return]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tmkd",
        description="Knowledge distillation on Ray, with text-guided multi-view teachers.",
    )
    parser.add_argument("--version", action="version", version=f"tmkd-ray {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[ExperimentConfig, argparse.Namespace], None], description: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description)
        _add_config(sub)
        sub.set_defaults(command=command)
        return sub

    add("run", _run, "the whole road: teachers, knowledge, students, evaluation, report")
    demo = add("demo", _run, "the whole road on scikit-learn's handwritten digits, in minutes")
    demo.set_defaults(config=demo_config())
    add("fit-teacher", _fit_teacher, "fit the visual teacher")
    add("fit-clip", _fit_clip, "fit CLIP on views and prior-aware prompts")
    knowledge = add(
        "knowledge",
        _knowledge,
        "compute the knowledge store with the frozen teachers; `show` says what is in one, `verify` checks one",
    )
    knowledge.add_argument("--store", metavar="PATH", help="with show and verify: a store, without a config")
    knowledge.usage = "tmkd knowledge [show | verify] [--store PATH] [--config FILE] [path=value ...]"
    add("distill", _distill, "train the students from the knowledge store")
    ablate = add("ablate", _ablate, "leave out each part of TMKD in turn, over strategies and seeds; one table")
    ablate.add_argument(
        "--strategies", metavar="NAME,NAME", help="distillation strategies to do it with; default: the config's"
    )
    evaluate = add("evaluate", _evaluate, "measure the teachers and students that are there")
    evaluate.add_argument("--split", choices=("test", "validation"), default="test")
    config = commands.add_parser("config", help="look at a configuration")
    actions = config.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the resolved configuration")
    _add_config(show)
    show.set_defaults(command=_show)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="override, as training.epochs=20")


# The stages are imported by the commands that need them: Ray and torch take seconds to load.


def _show(config: ExperimentConfig, options: argparse.Namespace) -> None:
    print(dump_config(config), end="")


def _ablate(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.ablation import ablate, ablation_config
    from tmkd_ray.stages.session import ray_session

    strategies = None if options.strategies is None else options.strategies.split(",")
    experiment = _checked(ablation_config(config, strategies))
    with ray_session(experiment.config):
        ablate(experiment)


def _checked(config: ExperimentConfig) -> "Experiment":
    """Open an experiment and check all that a whole run needs, before it starts."""
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


def _run(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.run import run
    from tmkd_ray.stages.session import ray_session

    experiment = _checked(config)
    with ray_session(config):
        run(experiment)


def _fit_teacher(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.experiment import check_visual_teacher, open_experiment
    from tmkd_ray.stages.fitting import fit_teacher
    from tmkd_ray.stages.session import ray_session

    if config.teacher.visual.checkpoint is not None:
        raise UserError(
            f"teacher.visual.checkpoint is {config.teacher.visual.checkpoint}: nothing to fit; set it to null"
        )
    experiment = open_experiment(config)
    check_visual_teacher(experiment)
    with ray_session(config):
        experiment.save_config()
        fitted = fit_teacher(experiment)
    assert fitted.outcome is not None
    print(f"{fitted.path}\nvalidation accuracy {100 * fitted.outcome.validation_accuracy:.2f} %")


def _fit_clip(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.experiment import open_experiment
    from tmkd_ray.stages.fitting import fit_clip
    from tmkd_ray.stages.session import ray_session

    if config.teacher.text is None or config.teacher.text.model is not None:
        raise UserError("teacher.text names a model or is null: nothing to fit; set teacher.text.model to null")
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


def _knowledge(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.experiment import check_text_teacher, check_visual_teacher, open_experiment
    from tmkd_ray.stages.fitting import fit_clip, fit_teacher
    from tmkd_ray.stages.knowledge import check_store, compute_knowledge
    from tmkd_ray.stages.session import ray_session

    experiment = open_experiment(config)
    check_store(experiment)
    check_visual_teacher(experiment)
    check_text_teacher(experiment)
    with ray_session(config):
        experiment.save_config()
        result = compute_knowledge(experiment, fit_teacher(experiment), fit_clip(experiment))
    manifest = result.manifest
    print(
        f"{result.store.path}: {manifest.rows('train'):,} training and {manifest.rows('validation'):,} "
        f"validation images, {len(manifest.shards)} shards, {manifest.total_bytes() / 1e6:.1f} MB"
    )


def _inspect_store(action: str, options: argparse.Namespace) -> int:
    """Show or verify a store; return the exit code."""
    from tmkd_ray import storage
    from tmkd_ray.knowledge import KnowledgeStore
    from tmkd_ray.knowledge.verification import describe_store, format_summary, verify_store
    from tmkd_ray.stages.experiment import knowledge_path

    if options.store is None:
        path = knowledge_path(read_config(options.config, options.overrides))
    elif options.config is None and not options.overrides:
        path = storage.absolute(options.store)
    else:
        raise UserError("--store names the store; give it without a config and overrides")
    store = KnowledgeStore(path)
    if action == "show":
        print(format_summary(describe_store(store)))
        return 0
    problems = verify_store(store)
    for problem in problems:
        print(problem)
    print(f"{path}: {len(problems)} problems" if problems else f"{path}: sound")
    return 1 if problems else 0


def _distill(config: ExperimentConfig, options: argparse.Namespace) -> None:
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


def _evaluate(config: ExperimentConfig, options: argparse.Namespace) -> None:
    from tmkd_ray.stages.evaluation import format_measured, found_networks, measure
    from tmkd_ray.stages.experiment import check_text_teacher, check_visual_teacher, open_experiment
    from tmkd_ray.stages.session import ray_session

    experiment = open_experiment(config)
    check_visual_teacher(experiment)
    check_text_teacher(experiment)
    networks = found_networks(experiment)
    with ray_session(config):
        print(format_measured(measure(experiment, networks, options.split)))


if __name__ == "__main__":
    sys.exit(main())
