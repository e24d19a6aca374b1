"""Turns the words of a command line into a call of one command.

Fire assigns the words to parameters. `parse_value` alone turns their texts into values, by the
annotations of the parameters. A command runs once its whole command line is accepted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Literal, NewType

from flallm.utils import UserError

Count = NewType("Count", int)  # from 0 on
PositiveInt = NewType("PositiveInt", int)
Seconds = NewType("Seconds", float)  # from 0 on
PositiveFloat = NewType("PositiveFloat", float)

Command = Callable[..., int | None]  # returns its exit code; None is 0
WIDTH = 100


def run(
    words: list[str],
    commands: dict[str, Command],
    program: str,
    overview: Callable[[], str],
) -> int:
    """Runs the command that the words name. Returns the exit code: 0 done, 2 the user's mistake.

    A mistake is one line on stderr. Without a command, or with --help alone, prints the overview.
    """
    write_utf8()
    if not words or words[0] in ("--help", "-h"):
        print(overview())
        return 0
    if words[0] not in commands:
        names = ", ".join(commands)
        return _mistake(program, f"there is no command {words[0]!r}, but {names}")
    return run_command(commands[words[0]], words[1:], program, words[0])


def run_command(command: Command, words: list[str], program: str, name: str = "") -> int:
    """Runs one command on the words after its name. Returns the exit code."""
    full_name = f"{program} {name}".strip()
    if "--help" in words or "-h" in words:
        print(command_help(command, full_name))
        return 0
    try:
        work = _accept(command, words, full_name)
        return work() or 0
    except UserError as error:
        return _mistake(program, error)


def _mistake(program: str, error: object) -> int:
    print(f"{program}: {error}", file=sys.stderr)
    return 2


def _accept(command: Command, words: list[str], name: str) -> Callable[[], int | None]:
    """The call that the words mean. Raises UserError where Fire or a value refuses them."""
    import fire
    from fire.decorators import SetParseFn

    calls = []

    @functools.wraps(command)
    def accept(*arguments: str, **options: str) -> None:
        calls.append(_bind(command, arguments, options))

    SetParseFn(str)(accept)  # Fire would make numbers and lists of some texts
    words = [_expand_home(word) for word in words]
    _check_values(words)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            fire.Fire(accept, words, name)
    except fire.core.FireExit:
        lines = [x for x in errors.getvalue().splitlines() if x.startswith("ERROR: ")]
        cause = lines[0].removeprefix("ERROR: ") if lines else "the command line is not understood"
        raise UserError(f"{cause} (see {name} --help)") from None
    return calls[0]


def _bind(
    command: Command, arguments: tuple[str, ...], options: dict[str, str]
) -> Callable[[], int | None]:
    """The call of the command with parsed values. Defaults stay as they are."""
    signature = inspect.signature(command, eval_str=True)
    bound = signature.bind(*arguments, **options)
    for name, given in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            values = tuple(parse_value(name, text, parameter.annotation) for text in given)
        elif parameter.kind is parameter.VAR_KEYWORD:
            values = {k: parse_value(k, text, parameter.annotation) for k, text in given.items()}
        elif given is parameter.default:  # Fire passes on the default of a positional parameter
            values = given
        else:
            values = parse_value(name, given, parameter.annotation)
        bound.arguments[name] = values
    return functools.partial(command, *bound.args, **bound.kwargs)


def parse_value(option: str, text: str, kind: object) -> object:
    """The value of an option by the annotation of its parameter. Raises UserError."""
    kinds = [k for k in typing.get_args(kind) if k is not NoneType]
    if typing.get_origin(kind) is Literal:
        if text not in kinds:
            raise UserError(f"--{option}: {text!r} is none of {', '.join(kinds)}")
        return text
    if kinds:  # X | None, whose None is the default
        return parse_value(option, text, kinds[0])
    if kind is str:
        return text
    if kind is Path:
        return Path(text)
    if kind is Count:
        return _whole_number(option, text, 0)
    if kind is PositiveInt:
        return _whole_number(option, text, 1)
    if kind is Seconds:
        return _number(option, text, "a number of seconds")
    if kind is PositiveFloat:
        value = _number(option, text, "a number above 0")
        if not value:
            raise UserError(f"--{option}: {text!r} is not a number above 0")
        return value
    raise TypeError(f"--{option}: no parser for {kind}")


def _whole_number(option: str, text: str, least: int) -> int:
    if text.isdecimal() and int(text) >= least:
        return int(text)
    allowed = f" from {least} on" if least else ""
    raise UserError(f"--{option}: {text!r} is not a whole number{allowed}")


def _number(option: str, text: str, allowed: str) -> float:
    if text.replace(".", "", 1).isdecimal():
        return float(text)
    raise UserError(f"--{option}: {text!r} is not {allowed}")


def _expand_home(word: str) -> str:
    """--data.shards=~/DIR, whose ~ a shell leaves as it is."""
    option, _, value = word.partition("=")
    if word.startswith("--") and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"
    return word


def _check_values(words: list[str]) -> None:
    """Raises UserError for an option without a value, of which Fire makes the text True."""
    for word, following in zip(words, [*words[1:], "--"]):
        if word == "--":  # Fire reads the rest
            return
        if word.startswith("--") and "=" not in word and following.startswith("--"):
            raise UserError(f"{word} has no value: write {word}=VALUE")


def command_help(command: Command, name: str) -> str:
    """The usage of a command and its docstring."""
    parts = [_usage(parameter) for parameter in inspect.signature(command).parameters.values()]
    usage = textwrap.fill(
        " ".join([name, *parts]),
        WIDTH,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{usage}\n\n{inspect.getdoc(command)}"


def _usage(parameter: inspect.Parameter) -> str:
    name = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"{name.upper()}…"
    if parameter.kind is parameter.VAR_KEYWORD:
        return "[--NAME=VALUE …]"
    required = parameter.default is parameter.empty
    text = name.upper()
    if parameter.kind is parameter.KEYWORD_ONLY:
        value = name.upper() if required or not parameter.default else parameter.default
        text = f"--{name}={value}"
    return text if required else f"[{text}]"


def summary(command: Command) -> str:
    """The first line of a command's docstring."""
    return inspect.getdoc(command).splitlines()[0]


def write_utf8() -> None:
    """Makes this process and the ranks that it starts print UTF-8, whatever the locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", "utf-8:backslashreplace")
