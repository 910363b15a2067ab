"""The engine starts with the speculator, and generates."""

from __future__ import annotations

from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
    """Starts one engine for every architecture."""
    names = subject.used_architectures()
    for architecture in names:
        folder = subject.targets.get(architecture) if architecture != "given" else subject.targets.get()
        with subject.start(folder) as session:
            session.generate([[3, 4, 5, 3, 4]], [SamplingParams(temperature=0, max_tokens=3)])
    return f"on {', '.join(names)}"


CHECK = Check(
    "startup",
    "the engine starts with it",
    "Hooks have the right names and arguments, the settings are accepted, and one request is served on every architecture.",
    "Look at the names and arguments of your `@hookimpl` methods, and at the keys you read from the configuration.",
    run,
)
