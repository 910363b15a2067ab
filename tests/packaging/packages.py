"""Packages that a user may have installed: good, broken, old, too new, twice. Each is built and installed as any other."""

from __future__ import annotations

from pathlib import Path

import attrs

GOOD = """
from specplug import Proposal, SpeculatorTraits, hookimpl

class RepeatLast:
    traits = SpeculatorTraits(token_only=True)

    @hookimpl
    def propose(self, batch):
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

@hookimpl
def load_speculator(config, target):
    return RepeatLast()
"""
LOSSY = """
from specplug import Proposal, Verdict, hookimpl

class Lossy:
    @hookimpl
    def propose(self, batch):
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    @hookimpl
    def verify(self, batch, proposal, target):
        ends = [offset + len(tokens) for offset, tokens in zip(target.offsets, proposal.tokens)]
        return Verdict([list(range(len(tokens))) for tokens in proposal.tokens], target.argmax(ends))

@hookimpl
def load_speculator(config, target):
    return Lossy()
"""
RAISING_WRAPPERS = """
from specplug import hookimpl

@hookimpl(wrapper=True)
def propose(batch):
    yield
    raise RuntimeError("propose is not observed")

@hookimpl(wrapper=True)
def verify(batch, proposal, target):
    yield
    raise RuntimeError("verify is not observed")
"""
LYING_WRAPPER = """
from specplug import Verdict, hookimpl

@hookimpl(wrapper=True)
def verify(batch, proposal, target):
    verdict = yield
    try:
        verdict.next_tokens[0] = 7
    except TypeError:
        pass
    return Verdict([[] for _ in batch.rows], [7 for _ in batch.rows])
"""
HIJACKING_VERIFY = """
from specplug import Verdict

@hookimpl
def verify(batch, proposal, target):
    return Verdict([[] for _ in batch.rows], [7 for _ in batch.rows])
"""
PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "{summary}"
requires-python = ">=3.11"
dependencies = ["{requires}"]

[project.entry-points.{group}]
{method} = "{entry}"

[tool.hatch.build.targets.wheel]
include = ["{module}.py"]
"""


@attrs.frozen
class Package:
    """A package of one module.

    Attributes:
        name: the distribution's.
        method: its entry point.
        source: of its module.
        requires: its requirement on core.
        attribute: what the entry point names in the module; nothing for the module itself.
        version: of the distribution.
        group: of the entry point.
    """

    name: str
    method: str
    source: str = GOOD
    requires: str = "specplug>=0.1,<0.2"
    attribute: str = ""
    version: str = "1.0"
    group: str = "specplug"

    def write(self, root: Path) -> Path:
        """Writes its sources below a folder; returns the project's."""
        module = self.name.replace("-", "_")
        folder = root / self.name
        folder.mkdir(parents=True)
        (folder / f"{module}.py").write_text(self.source, encoding="utf-8")
        text = PYPROJECT.format(
            name=self.name,
            version=self.version,
            summary=f"The method {self.method}.",
            requires=self.requires,
            group=f'"{self.group}"',
            method=self.method,
            module=module,
            entry=f"{module}:{self.attribute}" if self.attribute else module,
        )
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
        return folder


OBJECT = GOOD + "\nclass Plugin:\n    load_speculator = staticmethod(load_speculator)\nplugin = Plugin()\n"
PACKAGES = [
    Package("acme-good", "good"),
    Package("acme-object", "object", source=OBJECT, attribute="plugin"),
    Package("acme-lossy", "lossy", source=LOSSY),
    Package("acme-missing", "missing", source="import a_module_that_is_missing\n"),
    Package("acme-exits", "exits", source="print('leaving')\nraise SystemExit(3)\n"),
    Package(
        "acme-panics", "panics", source="class Panic(BaseException): ...\nraise Panic('from a native extension')\n"
    ),
    Package("acme-signature", "signature", source=GOOD.replace("(config, target)", "(config, target=None)")),
    Package("acme-misspelt", "misspelt", source=GOOD + "\n@hookimpl\ndef propse(batch): ...\n"),
    Package("acme-hookless", "hookless", source="answer = 42\n"),
    Package("acme-old", "old", requires="specplug<0.1"),
    Package("acme-future", "future", source="from specplug import TokenTrie\n", requires="specplug>=99"),
    Package("acme-twin-a", "twin"),
    Package("acme-twin-b", "twin"),
    Package("acme-observer", "observer", source=RAISING_WRAPPERS, group="specplug.observers"),
    Package("acme-liar", "liar", source=LYING_WRAPPER, group="specplug.observers"),
    Package("acme-hijacker", "hijacker", source=GOOD + HIJACKING_VERIFY),
    Package("acme-vandal", "vandal", source="import os\nos._exit(0)\n"),
    Package("acme-damaged", "damaged"),
]
