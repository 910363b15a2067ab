"""The function of vLLM's `vllm.general_plugins`: gives the proposer its runner, which knows the requests' names."""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_specplug_wrapped"


def register() -> None:
    """Wraps `load_model` of vLLM's runners; may be called several times, and does nothing for other proposers."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runners: list[Any] = [GPUModelRunner]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        runners.append(CPUModelRunner)
    for runner in runners:
        if "load_model" in vars(runner) and not hasattr(runner.load_model, _MARK):
            runner.load_model = _wrapped(runner.load_model)


def _wrapped(load_model: Any) -> Any:
    @functools.wraps(load_model)
    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        attach = getattr(getattr(self, "drafter", None), "attach_runner", None)
        if attach is not None:
            attach(self)
        return load_model(self, *arguments, **options)

    setattr(wrapped, _MARK, True)
    return wrapped
