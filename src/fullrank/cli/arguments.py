"""Reading a command line: flags, dotted keys, and dataclasses of options."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

from fullrank.errors import ConfigError

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


def read_options(kind: type[Options], arguments: list[str], *, command: str, usage: str) -> Options | None:
    """Read ``--field value`` for the fields of a dataclass, which all have defaults.

    A list is given with commas, a dictionary as ``--field.key value``, a switch may stand without its value.

    Returns:
        The options, or None if help was asked for and printed.

    Raises:
        ConfigError: Lists every unknown field and wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    from fullrank.train.recipes import nearest

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(kind, None)
    if {"-h", "--help"} & set(arguments):
        print(usage)
        text = parser.format_help()
        print(text[text.index("  --") :])
        return None
    known: dict[str, Any] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = with_switches(arguments, [name for name, field in known.items() if field.type == "bool"])
    values: dict[str, Any] = {}
    problems = []
    for key, text in given.items():
        name, _, inner = key.partition(".")
        if name not in known or (inner and not known[name].type.startswith("dict")):
            problems.append(f"{command} does not know --{key}.{nearest(name, known)}")
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
    return kind(**values)


def with_switches(arguments: list[str], switches: list[str]) -> dict[str, str]:
    """The keys and values of a command line, where a switch may stand without its value."""
    full: list[str] = []
    for place, word in enumerate(arguments):
        full.append(word)
        follows = arguments[place + 1] if place + 1 < len(arguments) else "--"
        if word.removeprefix("--") in switches and follows.startswith("--"):
            full.append("true")
    return pairs(full)
