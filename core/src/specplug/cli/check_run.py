"""What `specplug check` runs, and what it refuses before it runs anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specplug.cli.speculative_option import hint_at_keys
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

_OF_OBSERVERS = ("startup", "validity", "greedy", "seeds", "counters", "wrappers")


def make_subject(
    root: str, method: str, config: dict[str, Any], target: str | None, *, quick: bool
) -> tuple[Subject, bool]:
    """The subject, and whether it is a plugin that only wraps hooks."""
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
    """The checks that make a plugin conformant."""
    return tuple(check for check in CHECKS if not is_observer or check.name in _OF_OBSERVERS)


def choose_checks(only: tuple[str, ...], *, is_observer: bool) -> tuple[Check, ...]:
    """The checks to run: `startup`, and those that were asked for.

    Raises:
        ConfigurationError: there is no such check.
    """
    if not only:
        return whole_kit(is_observer=is_observer)
    wanted = {find_check("startup"), *map(find_check, only)}
    return tuple(check for check in CHECKS if check in wanted)


def find_check(name: str) -> Check:
    """A check by its name.

    Raises:
        ConfigurationError: there is no such check.
    """
    names = [check.name for check in CHECKS]
    if name not in names:
        raise ConfigurationError(f"no check named '{name}'{did_you_mean(name, names)} (checks: {', '.join(names)})")
    return CHECKS[names.index(name)]


def preflight(subject: Subject, method: str, *, has_target: bool) -> bool:
    """Plans one engine, so that a method that is not installed, or lacks keys, is one line and not twenty failures.

    Returns:
        Whether the method brings a `verify` of its own.

    Raises:
        SpecplugError: with what to give where keys are missing.
    """
    folder = subject.targets.get()
    try:
        planned = plan_engine(
            EngineConfig.create(
                subject.source(folder),
                speculative_config=subject.config(folder),
                plugins=subject.plugins,
                allowed_plugins=subject.allowed_plugins(subject.config(folder)),
                dtype="float32",
                device="cpu",
                skip_tokenizer_init=True,
            )
        )
        planned.facade.close()
    except ConfigurationError as error:
        hint_at_keys(error, has_target=has_target)
        raise
    return any(speculator.overrides_verify for speculator in planned.speculators if speculator.method == method)


def _is_observer(method: str) -> bool:
    """Whether what is installed under a name only observes."""
    kinds = {record.kind for record in find_plugins() if record.method == method}
    return kinds == {"observer"}
