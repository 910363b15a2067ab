"""Writes docs/hooks.md from the hook specifications and the types they name.

Run it again when one of them changes (a test fails until then):

    python docs/make_hook_reference.py
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from docstrings import Docstring

import specplug
from specplug.contract.batch import EndReason
from specplug.contract.hookspecs import SpeculatorHooks
from specplug.contract.memory import RegionKind, TableKind
from specplug.contract.traits import Boundary
from specplug.plugins.hooks import HOOKS

LONGEST_LINE = 100
PAGE = Path(__file__).parent / "hooks.md"
INTRODUCTION = """# Hook reference

*Written by `python docs/make_hook_reference.py` from the hook specifications; change those.*

A plugin is a module named by an entry point of group `specplug`; the entry point's name is the method that users put into
their configuration. The module implements `load_speculator`. The object which that returns implements the other hooks; only
`propose` is needed. Core calls them in this order:

```text
load_speculator → plan_memory → (weights are loaded, memory is allocated) → warmup → (propose → verify) per step
```

A hook may take fewer arguments than are listed here, and later versions only add some
([compatibility](compatibility.md)). Any hook may be wrapped instead of implemented ([observers](observers.md)). All names
below are imported from `specplug`.
"""
ALIASES = {"EndReason": EndReason, "Boundary": Boundary, "RegionKind": RegionKind, "TableKind": TableKind}
GROUPS = {
    "What propose sees": ("ProposalBatch", "ProposalRow", "TokenView", "Budget", "Outcome"),
    "What it returns": (
        "Proposal",
        "DraftDistributions",
        "sample",
        "process",
        "argmax_with_prob",
        "worth_another_token",
    ),
    "What verify sees and returns": ("VerificationBatch", "VerificationRow", "TargetDistributions", "Verdict"),
    "Configuration": ("SpeculativeConfig", "SpeculatorTraits", "ConfigurationError"),
    "The target, models and weights": (
        "TargetModel",
        "ModelHandle",
        "WeightsHandle",
        "ForwardRow",
        "TreeMask",
        "CheckpointError",
        "resolve_model",
    ),
    "Memory": ("MemoryBudget", "MemoryRegion", "KVLayer", "Resources", "KVCache", "BlockTable"),
    "For modules of one's own": ("PagedBatch", "pack_linears"),
}


def reference() -> str:
    """The page."""
    parts = [INTRODUCTION, "## The five hooks\n"]
    for name in HOOKS:
        parts += _hook(name)
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _documented(name, getattr(specplug, name))
    parts.append("## Short names in these types\n")
    parts += [f"- `{name}`: `{_alias(kind)}`" for name, kind in ALIASES.items()]
    return "\n".join(parts).rstrip() + "\n"


def _alias(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(kind)))}]"
    arguments = typing.get_args(kind)
    return " | ".join(map(_alias, arguments)) if arguments else str(kind.__name__)


def _hook(name: str) -> Iterator[str]:
    function = getattr(SpeculatorHooks, name)
    yield f"### {name}\n"
    yield from _function(name, function, drop_self=True)
    if example := Docstring.of(function).sections.get("Example"):
        yield f"```python\n{_breathing(example)}\n```\n"


def _documented(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}\n"
    if inspect.isclass(value):
        yield from _class(name, value)
    else:
        yield from _function(name, value)


def _class(name: str, cls: type) -> Iterator[str]:
    doc = Docstring.of(cls)
    if not issubclass(cls, Exception) and not getattr(cls, "_is_protocol", False):
        yield f"```text\n{name}{_shown(_constructor(cls), drop_return=True)}\n```\n"
    yield f"{doc.text}\n"
    described = doc.entries("Attributes")
    types = _types(cls)
    rows = []
    for attribute, text in described.items():
        kind = types.get(attribute, "")
        rows.append(f"| `{attribute}` | {_cell(f'`{kind}`' if kind else '')} | {_cell(text)} |")
    for attribute, value in vars(cls).items():
        if isinstance(value, property) and not attribute.startswith("_"):
            kind = str(inspect.signature(value.fget).return_annotation) if value.fget else ""
            rows.append(f"| `{attribute}` | {_cell(f'`{kind}`')} | {_cell(_flat(Docstring.of(value)))} |")
    if rows:
        yield "\n".join(["| attribute | type | meaning |", "|---|---|---|", *rows, ""])
    if missing := sorted(_public_fields(cls) - described.keys()):
        raise SystemExit(f"{name}: undocumented attributes: {', '.join(missing)}")
    for method, function in vars(cls).items():
        plain = function.__func__ if isinstance(function, staticmethod) else function
        if not method.startswith("_") and inspect.isfunction(plain):
            yield f"**`{name}.{method}`**\n"
            yield from _function(method, plain, drop_self=not isinstance(function, staticmethod))


def _constructor(cls: type) -> inspect.Signature:
    """The signature of a class with the types of its fields, which a converter hides."""
    signature, types = inspect.signature(cls), _types(cls)
    parameters = [
        parameter.replace(annotation=types.get(parameter.name, parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters)


def _function(name: str, function: Any, *, drop_self: bool = False) -> Iterator[str]:
    doc = Docstring.of(function)
    yield f"```text\n{name}{_shown(inspect.signature(function), drop_self=drop_self)}\n```\n"
    yield f"{doc.text}\n"
    if arguments := doc.entries("Args"):
        lines = [f"| `{argument}` | {_cell(text)} |" for argument, text in arguments.items()]
        yield "\n".join(["| argument | |", "|---|---|", *lines, ""])
    if returns := doc.paragraph("Returns"):
        yield f"**Returns** {returns}\n"
    if raises := doc.entries("Raises"):
        yield "**Raises** " + " ".join(f"`{error}`: {text}" for error, text in raises.items()) + "\n"


def _types(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= {name: str(kind) for name, kind in inspect.get_annotations(base).items()}
    return found


def _public_fields(cls: type) -> set[str]:
    if attrs.has(cls):
        names = {field.name for field in attrs.fields(cls) if field.init}
    elif getattr(cls, "_is_protocol", False):
        names = set(inspect.get_annotations(cls))
    else:
        names = set()
    return {name for name in names if not name.startswith("_")}


def _shown(signature: inspect.Signature, *, drop_self: bool = False, drop_return: bool = False) -> str:
    """A signature with its annotations as they are written; a long one has one parameter a line."""
    parts: list[str] = []
    for parameter in list(signature.parameters.values())[drop_self:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = parameter.default
        shown = "..." if isinstance(default, type(attrs.NOTHING)) else getattr(default, "__name__", repr(default))
        parts.append(
            f"{parameter.name}: {parameter.annotation}" + ("" if default is parameter.empty else f" = {shown}")
        )
    returned = "" if drop_return else f" -> {signature.return_annotation}"
    line = f"({', '.join(parts)}){returned}"
    return line if len(line) < LONGEST_LINE else "(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _breathing(example: str) -> str:
    """An example with the two blank lines around classes and functions that a module has."""
    before = re.sub(r"\n\n(?=class |def |@)", "\n\n\n", example)
    return re.sub(r"(\n +[^\n]*)\n\n(?=[^ \n])", r"\1\n\n\n", before)


def _flat(doc: Docstring) -> str:
    raises = " ".join(f"Raises `{error}`: {text}" for error, text in doc.entries("Raises").items())
    return " ".join(f"{doc.text} {raises}".split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
