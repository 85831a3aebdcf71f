"""The command line: one flag for each setting."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from genlip_megatron.config import (
    SECTIONS,
    RunConfig,
    from_dict,
    load_yaml,
    nearest,
    override,
    recipe_names,
)
from genlip_megatron.config.checks import check
from genlip_megatron.config.suggest import for_flag
from genlip_megatron.faults.exits import first_of_machine, say_error

RUN = "pretrain_genlip.py"
# What decides the model's size. The defaults of these settings are so16's.
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "text_hidden_size")


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors that suggest the flag or value that may be meant."""

    def error(self, message: str) -> typing.NoReturn:
        # The usage of a hundred flags, printed by each rank, would push this line off the screen.
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')} (see --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        argv = sys.argv[1:] if args is None else args
        self._check_switches(argv)
        known, unknown = self.parse_known_args(argv)
        if unknown:
            parsers = [self]
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers.append(action.choices[getattr(known, action.dest)])
            flags = [flag for parser in parsers for flag in parser._flags()]
            word = unknown[0].split("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            self.error(f"unknown {kind} {word}{for_flag(word, flags)}")
        return known

    def _flags(self) -> dict[str, argparse.Action]:
        return {flag: action for action in self._actions for flag in action.option_strings}

    def _check_switches(self, argv: Sequence[str]) -> None:
        """Refuse a flag with one dash, and a switch with a value; argparse's own errors for these are unclear."""
        flags = self._flags()
        for word, following in itertools.pairwise([*argv, "-"]):
            flag, equals, value = word.partition("=")
            if word == "--":
                return
            if re.match(r"-[A-Za-z]\w", flag) and flag not in flags:
                self.error(f"unknown flag {flag}{for_flag(flag, flags)}")
            switch = isinstance(flags.get(flag), argparse.BooleanOptionalAction)
            if switch and (equals or following.lower() in ("true", "false", "1", "0", "yes", "no", "on", "off")):
                name = flag.removeprefix("--no-").removeprefix("--")
                given = value if equals else following
                self.error(f"{flag} {given}: a switch takes no value; write --{name} or --no-{name}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            allowed = ", ".join(map(repr, choices))
            near = nearest(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}: expected one of {allowed}{near}")


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError if an option that ``options`` has is below its number in ``least``."""
    for name, lowest in least.items():
        if (value := getattr(options, name, lowest)) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


class RunParser(StrictParser):
    """The parser of a run's settings. Every rank finds the same error; one rank of each machine prints it."""

    def error(self, message: str) -> typing.NoReturn:
        if self.prog != RUN:  # a tool that takes a run's settings
            super().error(message)
        text = f"{message.rstrip('.')} (see --help)"
        say_error(text, first_of_machine(text))
        self.exit(2)


def build_parser() -> RunParser:
    """The command line of ``pretrain_genlip.py``: one flag per setting, grouped by section."""
    parser = RunParser(
        prog=RUN,
        usage="torchrun [...] %(prog)s [--config NAME|FILE] [--FLAG VALUE ...]",
        allow_abbrev=False,
        description="Train GenLIP. Settings come from the defaults below, then the recipe or YAML file, then flags.",
        epilog="To stop: Ctrl-C, SIGTERM, SIGUSR1 or the file <save>/stop. The run finishes its step, saves and exits "
        "with status 17; a second signal, more than a second later, kills it. Exit status: 0 done, 2 wrong setting or "
        "file, 17 stopped on request, others in docs/reliability.md.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=46, width=118),
    )
    parser.add_argument(
        "--config", default="", metavar="NAME|FILE", help=f"YAML file or recipe: {', '.join(recipe_names())}"
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, tokenizer, data, memory and disk for WORLD_SIZE (environment) processes, and exit",
    )
    for section, cls in SECTIONS.items():
        title, _, summary = cls.__doc__.strip().partition(". ")
        group = parser.add_argument_group(f"{title.rstrip('.')} (section {section!r} in YAML)", summary or None)
        kinds = typing.get_type_hints(cls)
        for f in fields(cls):
            kind = kinds[f.name]
            names = [f"--{f.name.replace('_', '-')}", *(f"--{alias}" for alias in f.metadata["aliases"])]
            default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            if kind is bool:
                default = "on" if default else "off"
            text = f"{f.metadata['help']} (default: {default if default != '' else 'none'})".replace("%", "%%")
            options: dict[str, Any] = {"dest": f"{section}.{f.name}", "default": argparse.SUPPRESS, "help": text}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is tuple:
                options["metavar"] = "LIST"
            else:
                options["metavar"] = "|".join(f.metadata["choices"]) or kind.__name__.upper()
            if f.metadata["switch"]:  # the flag and its --no- form, as they were before there were more choices
                yes, no = f.metadata["switch"]
                hidden = {"dest": options["dest"], "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
                group.add_argument(names[0].replace("--", "--no-", 1), action="store_const", const=no, **hidden)
                options |= {"nargs": "?", "const": yes}
            group.add_argument(*names, **options)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, str]:
    """(configuration, "print_config", "dry_run" or "" to train) from a command line.

    A user's error ends the process with one line and status 2.
    """
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    name = options.pop("config")
    asked = [action for action in ("dry_run", "print_config") if options.pop(action)]
    try:
        _check_start(name, options)
        config = read_settings(name, options)
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, asked[-1] if asked else ""


def read_settings(name: str, flags: Mapping[str, Any]) -> RunConfig:
    """The settings of a recipe or YAML file, if ``name`` is not empty, and of flags, {"section.key": value}.

    Warns of a size of the model that neither gives, and cuts settings in steps to a shorter ``--train-iters``.

    Raises:
        ValueError: as ``load_yaml``, ``from_dict`` and ``override`` do.
    """
    tree = load_yaml(name) if name else {}
    config = override(from_dict(tree, f"--config {name}"), flags)
    missing = [key for key in SIZES if key not in tree.get("model", {}) and f"model.{key}" not in flags]
    if missing:
        values = ", ".join(f"model.{key} = {getattr(config.model, key)}" for key in missing)
        _say(
            f"{f'--config {name}' if name else 'no --config'}: nothing sets {values}; the values are so16's. Set "
            + ("them, or add a line such as base: l16_stage1" if name else "them, or add --config NAME")
        )
    return override(config, _shortened(config, flags))


def _check_start(name: str, flags: Mapping[str, Any]) -> None:
    """Raise ValueError if nothing says which model to train: no file, no size, and no checkpoint to go on from."""
    save = flags.get("checkpoint.save")
    resumes = "checkpoint.load" in flags or (save and any(Path(save).glob("iter_*")))
    if not (name or resumes or any(f"model.{key}" in flags for key in SIZES)):
        raise ValueError(
            "--config: names no recipe, and no flag gives the model's size. Add --config with one of "
            f"{', '.join(recipe_names())}, or with the path of a YAML file"
        )


def _shortened(config: RunConfig, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in steps that do not fit a shorter ``--train-iters``, cut to it: {"section.key": value}.

    A flag is never cut, because it would not do what its user asked for.
    """
    steps, warmup, shorter = config.train.train_iters, config.train.lr_warmup_iters, dict[str, Any]()
    if "train.train_iters" not in flags or steps < 1:
        return {}
    if warmup >= steps and "train.lr_warmup_iters" not in flags:
        shorter["train.lr_warmup_iters"] = steps - 1
    first, last = config.log.profiled_steps
    if config.log.profile and last > steps and "log.profile_steps" not in flags:
        shorter["log.profile_steps"] = f"{min(first, steps)}:{steps}"
    for key, value in shorter.items():
        _say(f"{key} = {config.value(key)}: cut to {value}, because --train-iters is {steps}")
    return shorter


def _say(text: str) -> None:
    """Print a warning about settings on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: WARNING: {text}", file=sys.stderr, flush=True)
