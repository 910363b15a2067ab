"""Reports of `specplug list`: the metadata of a plugin and, with `--check`, the result of its import."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

import attrs

from specplug.errors import StartupError
from specplug.plugins.finder import PluginRecord, find_plugins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_TIMEOUT = 60.0  # seconds for one import; PyTorch and Transformers are imported before


@attrs.frozen
class PluginReport:
    """An installed plugin.

    Attributes:
        record: its metadata and status; the status is `failed` after a failed import.
        hooks: the hooks its module implements; None without an import.
        wraps: the hooks its module wraps; None without an import.
        traceback: of a failed import.
        verifiers: its speculators with a `verify` of their own; None without an import.
    """

    record: PluginRecord
    hooks: tuple[str, ...] | None = None
    wraps: tuple[str, ...] | None = None
    traceback: str | None = None
    verifiers: tuple[str, ...] | None = None

    @property
    def hook_summary(self) -> str:
        """Its hooks in one line; empty without an import."""
        return ", ".join([*(self.hooks or ()), *(f"{name} (wrapper)" for name in self.wraps or ())])

    def as_json(self) -> dict[str, Any]:
        """Returns the object of `specplug list --json`; keys are only added, never removed."""
        record = self.record
        return {
            "method": record.method,
            "package": record.distribution,
            "version": record.version,
            "status": record.status,
            "summary": record.summary,
            "reason": record.reason,
            "entry_point": record.module,
            "location": record.location,
            "requires": record.requirement,
            "hooks": None if self.hooks is None else list(self.hooks),
            "wraps": None if self.wraps is None else list(self.wraps),
            "traceback": self.traceback,
            "overrides_verify": None if self.verifiers is None else bool(self.verifiers),
            "kind": record.kind,
        }


def report_plugins(allowed: Iterable[str] | None, denied: Iterable[str]) -> list[PluginReport]:
    """Reports every installed plugin from its metadata, without an import."""
    return [PluginReport(record) for record in _sorted(find_plugins(allowed, denied))]


def check_plugins(allowed: Iterable[str] | None, denied: Iterable[str]) -> list[PluginReport]:
    """Reports every installed plugin. Allowed plugins are imported in a child process, which an import may end or block."""
    records = _sorted(find_plugins(allowed, denied))
    usable = [record for record in records if record.status == "ok"]
    answers: list[dict[str, Any]] = []
    while len(answers) < len(usable):
        answers += _import(usable[len(answers) :])
    found = iter(answers)
    return [_checked(record, next(found)) if record.status == "ok" else PluginReport(record) for record in records]


def _import(records: Sequence[PluginRecord]) -> list[dict[str, Any]]:
    """Imports plugins in turn, up to the first that ends or blocks the child process, and returns the results."""
    command = [
        sys.executable,
        "-m",
        "specplug.cli.run.plugin_import",
        json.dumps([attrs.asdict(each) for each in records]),
    ]
    path = os.pathsep.join(each for each in sys.path if each)
    lines: queue.Queue[str] = queue.Queue()
    answers: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            if lines.get() != "ready\n":
                process.wait()
                raise StartupError("the process that imports plugins did not start; its message is above")
            while len(answers) < len(records):
                line = lines.get(timeout=_TIMEOUT)
                if not line:
                    answers.append({"reason": f"its import ended the process (exit status {process.wait()})"})
                    break
                answers.append(json.loads(line))
        except queue.Empty:
            answers.append({"reason": f"its import did not end within {_TIMEOUT:.0f} seconds"})
        finally:
            process.kill()
            reader.join()
    return answers


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _sorted(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    return sorted(records, key=lambda record: (record.kind == "observer", record.method, record.distribution))


def _checked(record: PluginRecord, answer: dict[str, Any]) -> PluginReport:
    if answer["reason"]:
        record = attrs.evolve(record, status="failed", reason=answer["reason"])
    if "hooks" not in answer:
        return PluginReport(record, traceback=answer.get("traceback"))
    return PluginReport(record, tuple(answer["hooks"]), tuple(answer["wraps"]), verifiers=tuple(answer["verifiers"]))
