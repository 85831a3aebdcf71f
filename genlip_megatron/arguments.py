"""The command line: one flag for every field of the configuration."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from genlip_megatron.checks import check
from genlip_megatron.config import SECTIONS, RunConfig, from_dict, load_yaml, nearest, override, recipe_names


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and name the nearest known flag for an unknown one."""

    def error(self, message: str) -> typing.NoReturn:
        # The usage of some eighty flags would push the one line that matters off the screen, once per rank.
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')} (see --help)\n")

    def parse_strict(self, argv: Sequence[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].split("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            self.error(f"unknown {kind} {word}{nearest(word, flags)}")
        return known


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``pretrain_genlip.py``: one flag per configuration field, grouped by section."""
    parser = StrictParser(
        prog="pretrain_genlip.py",
        usage="%(prog)s [--config NAME|FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        description="Train GenLIP. Start it with torchrun; every flag overrides the same key of the recipe.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=46, width=118),
    )
    parser.add_argument(
        "--config", default="", metavar="NAME|FILE", help=f"one of {', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    for section, cls in SECTIONS.items():
        _, _, summary = (cls.__doc__ or "").strip().partition(". ")
        group = parser.add_argument_group(section, summary or None)
        kinds = typing.get_type_hints(cls)
        for f in fields(cls):
            names = [f"--{f.name.replace('_', '-')}", *(f"--{alias}" for alias in f.metadata["aliases"])]
            default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            if isinstance(default, bool):
                default = "on" if default else "off"
            text = f"{f.metadata['help']} (default: {default if default != '' else 'none'})".replace("%", "%%")
            common: dict[str, Any] = {"dest": f"{section}.{f.name}", "default": argparse.SUPPRESS, "help": text}
            if kinds[f.name] is bool:
                group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
            else:
                is_list = typing.get_origin(kinds[f.name]) is tuple
                metavar = "|".join(f.metadata["choices"]) or ("LIST" if is_list else kinds[f.name].__name__.upper())
                group.add_argument(*names, metavar=metavar, **common)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """(configuration, print_config) from a command line. User errors end the process with status 2 and one line."""
    parser = typing.cast(StrictParser, build_parser())
    options = vars(parser.parse_strict(sys.argv[1:] if argv is None else argv))
    name, print_config = options.pop("config"), options.pop("print_config")
    try:
        tree = load_yaml(name) if name else {}
        config = from_dict(tree, f"--config {name}" if name else "defaults")
        config = override(config, options)
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, print_config
