"""Dataclasses in the API reference: one table of their fields instead of a heading for each.

Our dataclasses explain a field by the text below it (what the command's ``--help`` prints too). The reference shows
arguments as a table, so that text is moved to where it looks for it, fields of the base classes included.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from griffe import Alias, Class, Docstring, Extension, Module


class OptionTables(Extension):
    """Turns the docstrings of a dataclass' fields into the ``Args`` of the class."""

    def on_package(self, *, pkg: Module, **_kwargs: Any) -> None:
        """Called when the whole package is read, before any of it is shown."""
        found = list(_dataclasses(pkg))
        texts = {cls.path: _field_texts(cls) for cls in found}  # of all first: a base class is changed too
        for cls in found:
            if texts[cls.path]:
                _explain(cls, texts[cls.path])


def _dataclasses(module: Module) -> Iterator[Class]:
    for member in module.members.values():
        if isinstance(member, Alias):
            continue
        if isinstance(member, Module):
            yield from _dataclasses(member)
        elif isinstance(member, Class) and any(
            str(decorator.callable_path) == "dataclasses.dataclass" for decorator in member.decorators
        ):
            yield member


def _field_texts(cls: Class) -> dict[str, str]:
    """Field -> what is said of it, those of the base classes first, as the constructor has them."""
    found: dict[str, str] = {}
    for owner in [*reversed(cls.mro()), cls]:
        for name, member in owner.members.items():
            if _is_field(member) and member.docstring is not None:
                found[name] = inspect.cleandoc(member.docstring.value)
    return found


def _is_field(member: Any) -> bool:
    return not isinstance(member, Alias) and member.is_attribute and "property" not in member.labels


def _explain(cls: Class, texts: dict[str, str]) -> None:
    for member in cls.members.values():
        if _is_field(member):
            member.docstring = None
    for parameter in cls.parameters:  # `field(default_factory=lambda: VALUE)` is shown as a call of the lambda
        default = re.fullmatch(r"\(lambda: (.*)\)\(\)", str(parameter.default), re.DOTALL)
        if default:
            parameter.default = default[1]
    # Google's format: a paragraph of a field is one indented line
    lines = [f"    {name}: " + " ".join(text.split()) for name, text in texts.items()]
    summary = cls.docstring.value if cls.docstring else ""
    cls.docstring = Docstring("\n".join([summary.rstrip(), "", "Args:", *lines]), parent=cls)
