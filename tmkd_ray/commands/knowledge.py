"""`tmkd knowledge`: compute a store; `show` says what is in one, `verify` checks one."""

import argparse

from tmkd_ray.commands.base import COMMANDS, ConfigCommand
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError

ACTIONS = ("show", "verify")


@COMMANDS.register("knowledge")
class Knowledge(ConfigCommand):
    description = (
        "compute the knowledge store with the frozen teachers; `show` says what is in one, `verify` checks one"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--store", metavar="PATH", help="with show and verify: a store, without a config")
        parser.usage = "tmkd knowledge [show | verify] [--store PATH] [--config FILE] [path=value ...]"

    def __call__(self, options: argparse.Namespace) -> int:
        if options.overrides and options.overrides[0] in ACTIONS:
            return _inspect(options.overrides[0], options.store, options.config, options.overrides[1:])
        if options.store is not None:
            raise UserError("--store goes with `tmkd knowledge show` and `tmkd knowledge verify`")
        return super().__call__(options)

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
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


def _inspect(action: str, path: str | None, config: str | None, overrides: list[str]) -> int:
    """Show or verify a store; return the exit code."""
    from tmkd_ray import storage
    from tmkd_ray.knowledge import KnowledgeStore
    from tmkd_ray.knowledge.summary import describe_store, format_summary
    from tmkd_ray.knowledge.verification import verify_store
    from tmkd_ray.progress import Rate
    from tmkd_ray.stages.experiment import knowledge_path

    if path is None:
        path = knowledge_path(read_config(config, overrides))
    elif config is None and not overrides:
        path = storage.absolute(path)
    else:
        raise UserError("--store names the store; give it without a config and overrides")
    store = KnowledgeStore(path)
    if action == "show":
        print(format_summary(describe_store(store)))
        return 0
    progress: list[Rate] = []

    def on_progress(_: int, total: int) -> None:
        progress[:] = progress or [Rate("verify", total, "shards")]
        progress[0].advance(1)

    problems = verify_store(store, on_progress)
    for problem in problems:
        print(problem)
    print(f"{path}: {len(problems)} problems" if problems else f"{path}: sound")
    return 1 if problems else 0
