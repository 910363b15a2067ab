"""vLLM's own engine, in this process. CONTRIBUTING.md says how to run these tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = [
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n",
    "x = [0, 0, 0, 0,",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n",
    "x = [0, 1, 0, 1, 0, 1,",
]
NUM_TOKENS = 5


class Engine:
    """One vLLM engine.

    Attributes:
        llm: vLLM's.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def greedy(
        self, prompts: list[str], max_tokens: int | list[int] = 48, adapters: Any = None, **options: Any
    ) -> list[list[int]]:
        """The tokens of greedy outputs; `adapters` has a LoRA request, or None, for each prompt."""
        from vllm import SamplingParams

        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        params = [SamplingParams(**{"temperature": 0, "max_tokens": n, "ignore_eos": True, **options}) for n in limits]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def greedy_but_aborted(self, prompts: list[str], aborted: int) -> dict[int, list[int]]:
        """The tokens of greedy outputs by the prompt's index; one request is aborted after four steps."""
        from vllm import SamplingParams

        core = self.llm.llm_engine
        for number, prompt in enumerate(prompts):
            core.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        for _ in range(4):
            core.step()
        core.abort_request([str(aborted)])
        done: dict[int, list[int]] = {}
        while core.has_unfinished_requests():
            ended = [output for output in core.step() if output.finished]
            done |= {int(output.request_id): list(output.outputs[0].token_ids) for output in ended}
        return done

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def proposer(self) -> Any:
        """specplug's class in it."""
        return self.runner.drafter

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def start(speculative: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    """Starts vLLM on the embedded model in float32.

    Args:
        speculative: specplug's configuration; None decodes plainly.
        options: of vLLM; `host` is `additional_config["specplug_host"]`, `worker` starts specplug's worker.
    """
    from vllm import LLM

    from specplug import resolve_model

    host = options.pop("host", {})
    if options.pop("worker", False):
        options["worker_cls"] = "specplug_vllm.Worker"
    settings: dict[str, Any] = {
        "model": str(resolve_model("tiny")),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "disable_log_stats": False,
    }
    if speculative is not None:
        settings["speculative_config"] = {
            "method": "custom_class",
            "model": "specplug_vllm.SpecplugProposer",
            "num_speculative_tokens": NUM_TOKENS,
        }
        settings["additional_config"] = {"specplug": dict(speculative), "specplug_host": host}
    engine = Engine(LLM(**settings | options))
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
