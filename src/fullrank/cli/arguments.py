"""Reading a command line: flags, dotted keys, and dataclasses of options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from fullrank.errors import ConfigError
from fullrank.train.config import SECTIONS

Options = TypeVar("Options")


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags of the command itself, and every ``--section.field value`` as a dotted key and a string."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        flags, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    return flags, pairs(rest)


def pairs(words: list[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` as keys and strings.

    Raises:
        ConfigError: If a word is out of place or a key has no value.
    """
    rest, found = list(words), dict[str, str]()
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or len(token) == 2:
            raise ConfigError(f"expected --section.field, got {token!r}. Quote a value that has spaces.")
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, such as --{key} true.")
            value = rest.pop(0)
        found[key] = value
    return found


def read_options(
    kind: type[Options],
    arguments: list[str],
    *,
    command: str,
    usage: str,
    words: str | None = None,
    overrides: str | None = None,
) -> Options | None:
    """Read ``--field value`` for the fields of a dataclass, which all have defaults.

    A list is given with commas, a dictionary as ``--field.key value``, a switch may stand without its value.

    Args:
        kind: The dataclass.
        arguments: The command line after the command.
        command: The command, for messages.
        usage: Printed above the fields where help is asked for.
        words: Name of the field, a list, that takes the words which belong to no option; None: there must be none.
        overrides: Name of the field, a dictionary, that takes ``--section.field value`` of a run's configuration, and
            its ``--seed``; None: they are unknown.

    Returns:
        The options, or None if help was asked for and printed.

    Raises:
        ConfigError: Lists every unknown field and wrong type.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    apart = {name for name in (words, overrides) if name is not None}
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(kind, None, skip=set(apart))
    if {"-h", "--help"} & set(arguments):
        print(usage)
        text = parser.format_help()
        print(re.sub(r", --\w+\+ \S+", "", text[text.index("  --") :]))  # jsonargparse's way to append to lists
        return None
    known: dict[str, Any] = {field.name: field for field in fields(kind) if field.name not in apart}  # type: ignore[arg-type]
    switches = [name for name, field in known.items() if field.type == "bool"]
    values: dict[str, Any] = {}
    if words is not None:
        values[words], arguments = separate(arguments, switches)
    given = with_switches(arguments, switches)
    if overrides is not None:
        values[overrides] = {key: given.pop(key) for key in list(given) if key not in known and is_of_run(key)}
    values |= _typed(parser, known, given, command=command, others=SECTIONS if overrides else ())
    return kind(**values)


def _typed(
    parser: Any, known: dict[str, Any], given: dict[str, str], *, command: str, others: Sequence[str]
) -> dict[str, Any]:
    """The values of the fields that are given, by their types."""
    from jsonargparse import ArgumentError

    from fullrank.train.recipes import nearest

    values: dict[str, Any] = {}
    problems = []
    for key, text in given.items():
        name, _, inner = key.partition(".")
        if name not in known or (inner and not known[name].type.startswith("dict")):
            problems.append(f"{command} does not know --{key}.{nearest(name, [*known, *others])}")
        elif inner:
            values.setdefault(name, {})[inner] = text
        else:
            try:
                value = "[" + text + "]" if known[name].type.startswith("list") and not text.startswith("[") else text
                values[name] = parser.parse_args([f"--{name}={value}"])[name]
            except ArgumentError as error:
                lines = str(error).strip().splitlines()
                expected = next((line.strip() for line in lines if line.strip().startswith("Expected")), lines[-1])
                problems.append(f"--{name} {text!r} has the wrong type or value. {expected.split('. Got value')[0]}.")
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def is_of_run(key: str) -> bool:
    """Whether a key is one that a run is told: ``section.field``, or its seed."""
    section, _, field = key.partition(".")
    return bool(section in SECTIONS and field) or key == "seed"


def separate(arguments: list[str], switches: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that belong to no option, and the options with their values."""
    rest, words, options = list(arguments), list[str](), list[str]()
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            words.append(token)
            continue
        options.append(token)
        has_value = token.startswith("--") and "=" not in token and bool(rest) and not rest[0].startswith("--")
        if has_value and (token[2:] not in switches or rest[0] in ("true", "false")):
            options.append(rest.pop(0))
    return words, options


def with_switches(arguments: list[str], switches: list[str]) -> dict[str, str]:
    """The keys and values of a command line, where a switch may stand without its value."""
    full: list[str] = []
    for place, word in enumerate(arguments):
        full.append(word)
        follows = arguments[place + 1] if place + 1 < len(arguments) else "--"
        if word.removeprefix("--") in switches and follows.startswith("--"):
            full.append("true")
    return pairs(full)
