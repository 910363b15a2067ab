"""The checks as a pytest class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from specplug.testing.check import Check
from specplug.testing.checks import CHECKS
from specplug.testing.runner import run_check
from specplug.testing.subject import Flags, Subject
from specplug.testing.targets import Targets


class SpeculatorConformance:
    """Subclass it in a test module, say how to configure the speculator, and pytest runs every check.

    A check that does not apply passes, and its reason is recorded as the property `not_applicable` (in JUnit reports), and
    printed; so is one in which nothing was drafted, as `nothing_seen`, which fails where the flag `drafts` is set. Where
    the speculator cannot work at all one check fails, and those after it are skipped. To
    disagree with a check, override its method with `@pytest.mark.xfail(reason=…)`, never without a reason.

    Attributes:
        plugins: method → plugin, for a speculator that is not installed: a module, or a function of (config, target).
        architectures: of the tiny targets it runs on; empty takes the kit's own choice.
        quick: fewer trials and targets.
        deterministic: see `specplug.testing.Flags`, as for the flags that follow. None lets the kit find out.
    """

    plugins: ClassVar[Mapping[str, Any]] = {}
    architectures: ClassVar[tuple[str, ...]] = ()
    quick: ClassVar[bool] = False
    deterministic: ClassVar[bool | None] = None
    samples: ClassVar[bool | None] = None
    proposes_trees: ClassVar[bool | None] = None
    owns_kv: ClassVar[bool | None] = None
    reads_states: ClassVar[bool | None] = None
    drafts: ClassVar[bool | None] = None
    _subjects: ClassVar[dict[type, Subject]] = {}

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        """The `speculative_config` of the speculator for a target. Called once for each target.

        Args:
            target_folder: a tiny random model; a draft or head that fits it may be written below it.
        """
        raise TypeError("define speculative_config(self, target_folder) in your test class")

    def perfect_config(self, target_folder: Path) -> Mapping[str, Any] | None:
        """A configuration with which every draft for this target must be right; None if there is none."""
        return None

    @pytest.fixture
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        """What is under test; made once for the class."""
        cls = type(self)
        if cls not in self._subjects:
            root = tmp_path_factory.getbasetemp() / "specplug-targets" / f"{cls.__module__}.{cls.__qualname__}"
            root.mkdir(parents=True, exist_ok=True)
            flags = {name: getattr(self, name) for name in Flags.__annotations__}
            self._subjects[cls] = Subject(
                make_config=self.speculative_config,
                targets=Targets(root),
                plugins=self.plugins,
                flags=Flags(**flags),
                make_perfect=self.perfect_config,
                architectures=self.architectures,
                quick=self.quick,
            )
        return self._subjects[cls]


def _test_of(check: Check) -> Callable[..., None]:
    def test(self: SpeculatorConformance, subject: Subject, record_property: Callable[[str, object], None]) -> None:
        result = run_check(check, subject)
        record_property({"ok": "evidence"}.get(result.verdict, result.verdict.replace(" ", "_")), result.text)
        if result.verdict == "not run":
            pytest.skip(result.text)
        if result.verdict == "failed":
            pytest.fail(f"{check.title}\n{result.text}\n     see: {check.see}", pytrace=False)
        print(f"{check.name}: {result.verdict}: {result.text}")

    test.__name__ = f"test_{check.name}"
    test.__qualname__ = f"SpeculatorConformance.{test.__name__}"
    test.__doc__ = check.explanation
    return test


for _check in CHECKS:
    setattr(SpeculatorConformance, f"test_{_check.name}", _test_of(_check))
