"""The command line: one flag for every field of the configuration."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from genlip_megatron.config import (
    SECTIONS,
    RunConfig,
    foreign_names,
    from_dict,
    load_yaml,
    nearest,
    override,
    recipe_names,
)
from genlip_megatron.config.checks import check
from genlip_megatron.faults.exits import first_of_machine, say_error

RUN = "pretrain_genlip.py"


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and say for an unknown flag or value what may be meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self.parse_strict(sys.argv[1:] if args is None else args)

    def error(self, message: str) -> typing.NoReturn:
        # The usage of some eighty flags would push the one line that matters off the screen, once per rank.
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')} (see --help)\n")

    def parse_strict(self, argv: Sequence[str]) -> argparse.Namespace:
        self._check_switches(argv)
        known, unknown = self.parse_known_args(argv)
        if unknown:
            parsers = [self]
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers.append(action.choices[getattr(known, action.dest)])
            flags = {flag: action for parser in parsers for action in parser._actions for flag in action.option_strings}
            word = unknown[0].split("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            self.error(f"unknown {kind} {word}{_instead(word, flags)}")
        return known

    def _check_switches(self, argv: Sequence[str]) -> None:
        """Refuse what argparse would say in riddles: a flag with one dash, a switch with a value."""
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        for word, following in itertools.pairwise([*argv, "-"]):
            flag, equals, value = word.partition("=")
            if word == "--":
                return
            if re.match(r"-[A-Za-z]\w", flag) and flag not in flags:
                self.error(f"unknown flag {flag}{_instead(flag, flags)}")
            switch = isinstance(flags.get(flag), argparse.BooleanOptionalAction)
            if switch and (equals or following.lower() in ("true", "false", "1", "0", "yes", "no", "on", "off")):
                on = "--" + flag.removeprefix("--no-").removeprefix("--")
                given = value if equals else following
                self.error(f"{flag} {given}: a switch takes no value; write {on} or --no-{on.removeprefix('--')}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            allowed = ", ".join(map(repr, choices))
            near = nearest(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}: expected one of {allowed}{near}")


def _instead(word: str, flags: Mapping[str, argparse.Action]) -> str:
    """The end of a sentence that names an unknown flag or argument: what is meant instead, if it can be told."""
    name = foreign_names.plain(word)
    # As section.key, as YAML has it.
    target = "--" + foreign_names.EQUAL.get(name, name.rpartition(".")[2]).replace("_", "-")
    if target in flags and name not in foreign_names.INSTEAD:
        return f". Use {target}." if name in foreign_names.EQUAL else f". Did you mean {target!r}?"
    if name in foreign_names.INSTEAD and "--train-iters" in flags:
        return f": {foreign_names.INSTEAD[name]}."
    if name.startswith("no-") and (on := f"--{name.removeprefix('no-')}") in flags:
        return f": {on} takes a value and cannot be turned off."
    return nearest(word, list(flags))


class RunParser(StrictParser):
    """That of a run, all of whose ranks find the same error."""

    def error(self, message: str) -> typing.NoReturn:
        if self.prog != RUN:  # a tool that takes a run's settings
            super().error(message)
        text = f"{message.rstrip('.')} (see --help)"
        say_error(text, first_of_machine(text))
        self.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``pretrain_genlip.py``: one flag per configuration field, grouped by section."""
    parser = RunParser(
        prog=RUN,
        usage="%(prog)s [--config NAME|FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        description="Train GenLIP. Start it with torchrun; every flag overrides the same key of the recipe.",
        epilog="Ctrl-C, SIGTERM, SIGUSR1 or the file <save>/stop: the run finishes the step in flight, saves and "
        "leaves with status 17; a second signal, more than a second later, ends it at once. Exit status: 0 done, 2 a "
        "wrong setting or file, 17 stop requested; all others: docs/reliability.md.",
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
