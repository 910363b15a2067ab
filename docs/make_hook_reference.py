"""Writes docs/hooks.md from the hook specifications and the types that they name.

Run it after a change to one of them (a test fails until then):

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
from specplug.contract.hooks import SpeculatorHooks
from specplug.contract.resources import RegionKind, TableKind
from specplug.contract.types import Boundary, EndReason
from specplug.plugins.implementations import HOOKS

LONGEST_LINE = 100
PAGE = Path(__file__).parent / "hooks.md"
INTRODUCTION = """# Hook reference

*Written by `python docs/make_hook_reference.py` from the hook specifications; change those.*

A plugin is a module that an entry point of group `specplug` names; the name of the entry point is the method that users
configure. The module implements `load_speculator`. The object that it returns implements the other hooks; only `propose` is
required. Core calls them in this order:

```text
load_speculator → plan_memory → (weights are loaded, memory is allocated) → warmup → (propose → verify) per step
```

A hook may take fewer arguments than are listed here; later versions only add arguments ([compatibility](compatibility.md)).
[Observers](observers.md) wrap hooks instead of implementing them. All names below are imported from `specplug`.

### Positions and states

The target's forward of a step computes the states of the tokens that it is given, and the next token. So the last committed
token never has a state when `propose` is called: the next forward computes it. Three calls for a row with the prompt `a b c d`:

```text
                       position   0  1  2  3  4  5  6  7  8
after step 1           token      a  b  c  d  e               new_positions = range(0, 4)
                       state      ●  ●  ●  ●  -               propose returns the draft f g h

after step 2           token      a  b  c  d  e  f  g  x      new_positions = range(4, 7)
f, g accepted,         state      ·  ·  ·  ·  ●  ●  ●  -      propose returns no draft
h rejected

after step 3           token      a  b  c  d  e  f  g  x  y   new_positions = range(7, 8)
                       state      ·  ·  ·  ·  ·  ·  ·  ●  -

●  new: the batch's tensors hold it at row.new_states     ·  delivered by an earlier call
-  none yet: e, x and y are tokens that the target chose in that step (x after a rejection, else a bonus token)
```

The state of position i predicts token i + 1. A draft continues `row.tokens`: its root is the last committed token, or of `upcoming` tokens the last that comes.

### Who bounds a draft

| bound | set by | read by |
|---|---|---|
| `num_speculative_tokens`, with `"auto"` `max_num_speculative_tokens` | the user, in `speculative_config` | core, as the upper bound of all budgets; the plugin, as `config.num_speculative_tokens` |
| `traits.max_nodes`, `traits.max_depth` | the plugin, if its trees have other bounds than `num_speculative_tokens` | core, in its place |
| `budget.num_speculative_tokens` in `plan_memory` | core: the most nodes of a row, over all speculators of the chain | the plugin, to size its buffers |
| `row.budget.max_nodes`, `row.budget.max_depth` | core, for each row and step: at most the above; less near the end of a request, in a large batch, where the request asks for less (`SamplingParams.num_speculative_tokens`) or where `"auto"` finds less to be faster | the plugin, in `propose`; core refuses a larger draft |
"""  # noqa: E501
ALIASES = {"EndReason": EndReason, "Boundary": Boundary, "RegionKind": RegionKind, "TableKind": TableKind}
OTHER_ALIASES = {
    "FinishReason": "Why a completion ended: `stop`, `length`, `abort` or `error`.",
    "Message": "One message of a chat.",
    "PositionLogprobs": "The log-probabilities at one position, by token id.",
    "Prompt": "What `generate` takes as a prompt.",
}
GROUPS = {
    "What propose sees": ("ProposalBatch", "ProposalRow", "TokenView", "Budget", "Outcome"),
    "What it returns": (
        "Proposal",
        "DraftDistributions",
        "sample",
        "process",
        "argmax_with_prob",
    ),
    "What verify sees and returns": ("VerificationBatch", "VerificationRow", "TargetDistributions", "Verdict"),
    "The speculator and its settings": ("Speculator", "SpeculatorTraits", "SpeculativeConfig", "ConfigurationError"),
    "The target, models and weights": (
        "TargetModel",
        "ModelHandle",
        "WeightsHandle",
        "ForwardRow",
        "TreeMask",
        "UpcomingTokens",
        "CheckpointError",
        "resolve_model",
    ),
    "Memory": ("MemoryBudget", "MemoryRegion", "KVLayer", "Resources", "KVCache", "BlockTable", "OwnTables"),
    "For a speculator's own modules": ("PagedBatch", "pack_linears"),
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
    parts.append("\n## All other public names\n")
    shown = {"__version__", "hookimpl", *ALIASES, *(name for names in GROUPS.values() for name in names)}
    others = [name for name in specplug.__all__ if name not in shown]
    parts += ["| name | |", "|---|---|", *(f"| `{name}` | {_cell(_summary(name))} |" for name in others)]
    return "\n".join(parts).rstrip() + "\n"


def _summary(name: str) -> str:
    """The first sentence about a public name."""
    value = getattr(specplug, name)
    if not inspect.isclass(value):
        return OTHER_ALIASES[name]
    return re.split(r"(?<=[.:]) ", Docstring.of(value).text.replace("\n", " "))[0].rstrip(":")


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
