"""A Griffe extension: the docstrings' reStructuredText, which sentence-transformers uses as well, as Markdown; and the
help texts of training arguments as their docstrings.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?P<role>attr|class|data|func|meth|mod):`(?P<short>~?)\.?(?P<target>[\w.]+)`")
_MATH = re.compile(r":math:`(?P<formula>[^`]+)`")
_LINK = re.compile(r"(?<!`)`(?P<text>[^`<]+?)\s*<(?P<url>https?://[^>]+)>`_")
_LITERAL = re.compile(r"^(?P<indent> *)(?P<text>\S.*)?::\n\n(?P<block>(?:(?P=indent) +\S.*\n|\n)+)", re.MULTILINE)
_GRID = re.compile(r"^(?P<indent> *)\+[-+]+\+\n(?:(?P=indent)[|+].*\n?)+", re.MULTILINE)
_SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*\n(?:(?P=indent) +\S.*\n)*)", re.MULTILINE)
_SYMBOLS = {r"\langle ": "⟨", r" \rangle": "⟩", "^+": "⁺"}


class Markdown(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for each in pkg.modules.values():
            for cls in each.classes.values():
                _document_fields(cls)
        for each in _documented(pkg):
            each.docstring.value = to_markdown(each.docstring.value, each, pkg)


def to_markdown(text: str, scope: griffe.Object, package: griffe.Module) -> str:
    """``text`` with its roles, links, literal blocks, formulas and tables as Markdown has them.

    Args:
        scope: whose docstring it is: names are looked up there, then in ``package``.

    Raises:
        ValueError: a formula or a role that has no translation here.
    """
    text = _LITERAL.sub(_fenced, text + "\n")
    text = _SEVERAL.sub(_one_by_one, text).rstrip("\n")
    if scope.is_class and any(str(base) == "NamedTuple" for base in scope.bases):
        text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
    if scope.name == "__init__":  # of a loss: what a call of it returns
        text = re.sub(r"^Returns:$", "Returned by a step:", text, flags=re.MULTILINE)
    text = _GRID.sub(_table, text)
    text = _LINK.sub(lambda found: f"[{' '.join(found['text'].split())}]({found['url']})", text)
    text = _MATH.sub(_formula, text)
    text = _ROLE.sub(lambda found: _reference(found, scope, package), text)
    if left := re.search(r":[a-z]+:`", text):
        raise ValueError(f"{scope.path}: {text[left.start() : left.start() + 60]!r} is a role without translation.")
    return text


def _document_fields(cls: griffe.Class) -> None:
    """Add to a data class's docstring what it says of its fields in ``metadata``, for command lines."""
    if not any("metadata=" in str(member.value) for member in cls.attributes.values() if not member.is_alias):
        return
    fields = dataclasses.fields(griffe.dynamic_import(cls.path))
    helped = [f"    {each.name}: {each.metadata['help']}\n" for each in fields if each.name in cls.members]
    first, raises, rest = cls.docstring.value.partition("Raises:")
    cls.docstring.value = first + "Args:\n" + "".join(helped) + "\n" + raises + rest


def _documented(scope: griffe.Object) -> Iterator[griffe.Object]:
    if scope.docstring:
        yield scope
    for member in scope.members.values():
        if not member.is_alias:
            yield from _documented(member)


def _reference(found: re.Match[str], scope: griffe.Object, package: griffe.Module) -> str:
    """Code, linked to where the object is documented on this site, if it is."""
    target = found["target"]
    shown = target.rpartition(".")[2] if found["short"] else target
    shown += "()" if found["role"] in ("func", "meth") else ""
    path = _path(target, scope, package)
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>' if path else f"`{shown}`"


def _path(target: str, scope: griffe.Object, package: griffe.Module) -> str | None:
    """The full path of what ``target`` names in ``scope``; None if it is none of the package's."""
    if target.startswith(f"{package.path}."):
        return target
    first, _, rest = target.partition(".")
    for each in (scope, package):
        try:
            path = each.resolve(first)
        except griffe.NameResolutionError:
            continue
        if path.startswith(f"{package.path}."):
            return f"{path}.{rest}" if rest else path
    return None


def _formula(found: re.Match[str]) -> str:
    formula = found["formula"]
    for symbol, character in _SYMBOLS.items():
        formula = formula.replace(symbol, character)
    if re.search(r"[\\^_{}]", formula):
        raise ValueError(f"{found[0]} has no translation here: write it in plain characters, or add its symbols.")
    return f"`{formula}`"


def _fenced(found: re.Match[str]) -> str:
    indent, text = found["indent"], found["text"]
    block = textwrap.dedent(found["block"]).strip("\n")
    try:
        ast.parse(block)
        language = "python"
    except SyntaxError:
        language = "text"
    lines = [f"{text}:", ""] if text else []
    lines += [f"```{language}", *block.splitlines(), "```"]
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines) + "\n"


def _one_by_one(found: re.Match[str]) -> str:
    """What is said of several parameters at once, of each."""
    return "".join(f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", "))


def _table(found: re.Match[str]) -> str:
    """A grid table of one-line cells."""
    rows = [line.strip() for line in found[0].splitlines() if line.strip().startswith("|")]
    rule = re.sub(r"[^|]", "-", rows[0])
    return "\n".join(found["indent"] + row for row in [rows[0], rule, *rows[1:]]) + "\n"
