"""`tmkd config`: look at a configuration, or at what one may say."""

import argparse

from tmkd_ray.commands.base import COMMANDS, Command, add_config_arguments
from tmkd_ray.config_reading import dump_config, read_config


@COMMANDS.register("config")
class Config(Command):
    description = "look at a configuration"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
        show = actions.add_parser("show", help="print the resolved configuration")
        add_config_arguments(show)
        show.set_defaults(action=_show)
        reference = actions.add_parser("reference", help="print the reference of every key, as Markdown")
        reference.set_defaults(action=_reference)

    def __call__(self, options: argparse.Namespace) -> int:
        print(options.action(options), end="")
        return 0


def _show(options: argparse.Namespace) -> str:
    return dump_config(read_config(options.config, options.overrides))


def _reference(options: argparse.Namespace) -> str:
    from tmkd_ray.config_reference import config_reference

    return config_reference()
