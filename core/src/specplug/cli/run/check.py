"""Prepares the checks of `specplug check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.errors import ConfigurationError, did_you_mean
from specplug.plugins.finder import find_plugins
from specplug.testing import lookup
from specplug.testing.checks import CHECKS
from specplug.testing.subject import Subject
from specplug.testing.targets import Targets

if TYPE_CHECKING:
    from specplug.testing.check import Check

_OBSERVER_CHECKS = ("startup", "validity", "greedy", "seeds", "counters", "wrappers")


def make_subject(
    root: str, method: str, config: dict[str, Any], target: str | None, *, quick: bool
) -> tuple[Subject, bool]:
    """Returns the subject, and whether the plugin is an observer."""
    targets = Targets(Path(root), target)
    is_observer = _is_observer(method)
    if is_observer:
        config = {"method": lookup.METHOD, "num_speculative_tokens": 4}
    subject = Subject(
        make_config=lambda folder: config,
        targets=targets,
        plugins={lookup.METHOD: lookup.load_lookup} if is_observer else {},
        quick=quick,
        companions=(method,) if is_observer else (),
    )
    return subject, is_observer


def whole_kit(*, is_observer: bool) -> tuple[Check, ...]:
    """Returns the checks that make a plugin conformant."""
    return tuple(check for check in CHECKS if not is_observer or check.name in _OBSERVER_CHECKS)


def choose_checks(only: tuple[str, ...], *, is_observer: bool) -> tuple[Check, ...]:
    """Returns the checks to run: `startup`, and those in `only`; all if it is empty.

    Raises:
        ConfigurationError: there is no such check.
    """
    if not only:
        return whole_kit(is_observer=is_observer)
    wanted = {find_check("startup"), *map(find_check, only)}
    return tuple(check for check in CHECKS if check in wanted)


def find_check(name: str) -> Check:
    """Returns a check by name.

    Raises:
        ConfigurationError: there is no such check.
    """
    names = [check.name for check in CHECKS]
    if name not in names:
        raise ConfigurationError(f"no check named '{name}'{did_you_mean(name, names)} (checks: {', '.join(names)})")
    return CHECKS[names.index(name)]


def preflight(subject: Subject, method: str) -> bool:
    """Plans one engine, so that a missing method or key is one error and not twenty failed checks.

    Returns:
        Whether the method has a `verify` of its own.

    Raises:
        SpecplugError: the engine cannot be planned.
    """
    folder = subject.targets.get()
    config = subject.config(folder)
    planned = plan_engine(
        EngineConfig.create(
            subject.source(folder),
            speculative_config=config,
            plugins=subject.plugins,
            allowed_plugins=subject.allowed_plugins(config),
            dtype="float32",
            device="cpu",
            skip_tokenizer_init=True,
        )
    )
    planned.facade.close()
    return any(speculator.overrides_verify for speculator in planned.speculators if speculator.method == method)


def _is_observer(method: str) -> bool:
    """Whether only an observer is installed under this name."""
    kinds = {record.kind for record in find_plugins() if record.method == method}
    return kinds == {"observer"}
