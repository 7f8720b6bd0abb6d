"""`tmkd config show`: look at a configuration."""

import argparse

from tmkd_ray.commands.base import COMMANDS, Command, add_config_arguments
from tmkd_ray.config_reading import dump_config, read_config


@COMMANDS.register("config")
class Config(Command):
    description = "look at a configuration"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
        add_config_arguments(actions.add_parser("show", help="print the resolved configuration"))

    def __call__(self, options: argparse.Namespace) -> int:
        print(dump_config(read_config(options.config, options.overrides)), end="")
        return 0
