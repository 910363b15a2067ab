"""What is under test: a speculator, its configuration, and what its author says about it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.llm import LLM
from specplug.plugins.finder import find_plugins
from specplug.speculation.draft_length import FixedDraftLength
from specplug.testing.failures import CheckFailure, FundamentalFailure, describe
from specplug.testing.session import Pace, Session
from specplug.testing.targets import Targets


@attrs.frozen(kw_only=True)
class Flags:
    """Capabilities of a speculator. None lets the kit find out; True or False makes a promise that is checked.

    Attributes:
        deterministic: at temperature 0 its drafts depend on nothing but the row.
        samples: at temperatures above 0 it samples drafts and reports what they were drawn from.
        proposes_trees: some of its drafts branch.
        owns_kv: it plans a KV cache of its own.
        reads_states: it declares target states.
        drafts: it drafts something on the kit's targets, whose prompts and outputs repeat themselves.
    """

    deterministic: bool | None = None
    samples: bool | None = None
    proposes_trees: bool | None = None
    owns_kv: bool | None = None
    reads_states: bool | None = None
    drafts: bool | None = None


Config = Mapping[str, Any]
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_neox", "lfm2", "mixtral")
QUICK_ARCHITECTURES = ("llama", "gemma2")
MEMORY = 96 << 20


@attrs.define(eq=False)
class Subject:
    """A speculator under test.

    Attributes:
        make_config: gives the speculative config for a target's folder.
        targets: where targets come from.
        plugins: method → plugin, for one that is not installed.
        flags: what its author says about it.
        make_perfect: gives a config with which it must be right about a target, or None.
        architectures: of the targets it is run on.
        quick: fewer trials and targets.
        ended_by: why no further check is run; None while they are.
        companions: methods of installed plugins that are loaded too; all others are left out, so that no wrapper of theirs
            is taken for what is under test.
    """

    make_config: Callable[[Path], Config]
    targets: Targets
    plugins: Mapping[str, Any] = attrs.field(factory=dict)
    flags: Flags = attrs.field(factory=Flags)
    make_perfect: Callable[[Path], Config | None] = lambda folder: None
    architectures: tuple[str, ...] = ()
    quick: bool = False
    companions: tuple[str, ...] = ()
    ended_by: str | None = attrs.field(default=None, init=False)
    _pace: Pace = attrs.field(factory=Pace, init=False)
    _has_started: bool = attrs.field(default=False, init=False)
    _configs: dict[Path, Config] = attrs.field(factory=dict, init=False)
    _memory: dict[str, Any] = attrs.field(factory=dict, init=False)

    def config(self, folder: Path) -> dict[str, Any]:
        """The speculative config for a target; made once per target."""
        if folder not in self._configs:
            try:
                self._configs[folder] = self.make_config(folder)
            except Exception as error:
                raise FundamentalFailure("a speculative configuration for the target", describe(error)) from error
        return dict(self._configs[folder])

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config(self.targets.get())["method"])

    @property
    def learns(self) -> bool:
        """Whether it declares that its drafts may depend on other requests."""
        return bool(self.remember("learns", self._declares_learning))

    def _declares_learning(self) -> bool:
        with self.start(self.targets.get()) as session:
            return session.speculator.traits.learns

    def allowed_plugins(self, config: Config) -> tuple[str, ...] | None:
        """The installed packages that bring what a configuration names; None, for all, where one is not installed."""
        wanted = {*self.companions, *(method for method in _methods(config) if method not in self.plugins)}
        records = [record for record in find_plugins() if record.method in wanted]
        if {record.method for record in records} != wanted:
            return None  # the engine says what there is instead
        return tuple(sorted({record.distribution for record in records}))

    def used_architectures(self) -> tuple[str, ...]:
        """The architectures to run on; a target that was given stands for all."""
        if self.targets.given is not None:
            return ("given",)
        return self.architectures or (QUICK_ARCHITECTURES if self.quick else ARCHITECTURES)

    def scaled(self, full: int, quick: int) -> int:
        """How many trials to run."""
        return quick if self.quick else full

    def memory(self, size: int) -> int | None:
        """A budget in bytes that the kit's targets fit; the engine's own choice for a target that was given."""
        return size if self.targets.given is None else None

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """What several checks share, made by the first of them."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    @contextlib.contextmanager
    def start(self, folder: Path, *, config: Config | None = None, **options: Any) -> Iterator[Session]:
        """An engine with the speculator. Its faults cost drafts and are counted; the checks that are about them look.

        Raises:
            CheckFailure: it does not start; a fundamental one where none started before.
        """
        speculative = self.config(folder) if config is None else config
        allowed = self.allowed_plugins(speculative)
        options = {"speculative_config": speculative, "plugins": self.plugins, "allowed_plugins": allowed, **options}
        with contextlib.ExitStack() as stack:
            try:
                llm = stack.enter_context(self._llm(folder, **options))
            except Exception as error:
                kind = CheckFailure if self._has_started else FundamentalFailure
                raise kind("that an engine starts with it", describe(error)) from error
            self._has_started = True
            llm.engine.chain.policy = FixedDraftLength()  # automatic lengths follow the clock; a check sees the same
            yield Session(llm, self._pace)

    @contextlib.contextmanager
    def plain(self, folder: Path, **options: Any) -> Iterator[Session]:
        """An engine without any speculator."""
        with self._llm(folder, **{"allowed_plugins": (), **options}) as llm:
            yield Session(llm)

    @contextlib.contextmanager
    def _llm(self, folder: Path, **options: Any) -> Iterator[LLM]:
        fixed = {"dtype": "float32", "check_parity": False, "device": "cpu"}
        defaults = {"skip_tokenizer_init": True, "memory": self.memory(MEMORY), "max_model_len": None, **fixed}
        defaults["enable_prefix_caching"] = False  # whatever other requests left; one check is about it
        with quiet(), kept_randomness(), one_thread(), LLM(self.source(folder), **{**defaults, **options}) as llm:
            yield llm

    def source(self, folder: Path) -> str:
        """What to call a target: a given one by the name it was given, which methods may know."""
        given = self.targets.given
        return given if given is not None and folder == self.targets.get() else str(folder)


def _methods(config: Config) -> Iterator[str]:
    """The methods of a configuration and of its fallbacks."""
    part: Config | None = config
    while part:
        yield str(part.get("method"))
        part = part.get("fallback")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings about faults to those who provoke them."""
    logger = logging.getLogger("specplug")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Fixes the process's own random generators for a while, and puts them back as they were."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models are quicker on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
