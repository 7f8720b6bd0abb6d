"""`tmkd search`: a sweep over fields of the configuration; `show` says how far one is."""

import argparse

from tmkd_ray.commands.base import COMMANDS, ConfigCommand
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import read_config


@COMMANDS.register("search")
class Search(ConfigCommand):
    description = "sweep over fields of the configuration (section `search`); `show` says how far a sweep is"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.usage = "tmkd search [show] [--config FILE] [path=value ...]"

    def __call__(self, options: argparse.Namespace) -> int:
        if options.overrides[:1] == ["show"]:
            return _show(read_config(options.config, options.overrides[1:]))
        return super().__call__(options)

    def run(self, config: ExperimentConfig, options: argparse.Namespace) -> None:
        from tmkd_ray.search.space import check_space

        space = check_space(config)  # before seconds go into loading the rest
        from tmkd_ray.stages.search import open_stores, search
        from tmkd_ray.stages.session import ray_session
        from tmkd_ray.stages.sweep_searchers import check_searcher
        from tmkd_ray.trials import format_sweep

        check_searcher(space.search.searcher)
        experiments = open_stores(space)
        with ray_session(config):
            sweep = search(space, experiments)
        print(format_sweep(sweep))
        best = sweep.best()
        if best is not None:
            print(f"best: trial {best.number}, {sweep.record.folder}/best.yaml")
        print(f"report: {sweep.record.folder}/search.html")


def _show(config: ExperimentConfig) -> int:
    from tmkd_ray.search.space import check_space, sweep_folder
    from tmkd_ray.trials import format_sweep, load_sweep

    print(format_sweep(load_sweep(sweep_folder(check_space(config)))))
    return 0
