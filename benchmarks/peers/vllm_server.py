"""One vLLM engine that measures what it is told, line by line; run with vLLM's own Python by `benchmarks/peers/vllm.py`.

The arguments of `vllm.LLM` come as one JSON object on the command line. Every line on standard input is a run, every line
on standard output what it took; vLLM's own output goes to standard error. As in specplug's runs, a fixed number of requests
is under way: when one ends, the next begins.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1


def serve(options: dict[str, Any]) -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import LLM, __version__

    llm = LLM(**options)
    print(json.dumps({"version": __version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(run(llm, **json.loads(line))), file=answers)


def run(llm: Any, prompts: list[list[int]], max_tokens: int, temperature: float, batch: int) -> dict[str, Any]:
    """Generates for all prompts, `batch` at a time; `arrivals[n]` counts the steps in which a request gained n tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    waiting = list(enumerate(prompts))[::-1]
    outputs: list[list[int]] = [[] for _ in prompts]
    last: dict[int, float] = {}
    first_token_seconds, token_seconds = [], []
    arrivals = [0] * (max_tokens + 1)
    started = time.perf_counter()
    while waiting or last:
        while waiting and len(last) < batch:
            index, ids = waiting.pop()
            last[index] = time.perf_counter()
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
        finished = engine.step()
        now = time.perf_counter()
        for output in finished:
            index = int(output.request_id.partition("-")[0])
            new = list(output.outputs[0].token_ids)
            if new and outputs[index]:
                token_seconds += [(now - last[index]) / len(new)] * len(new)
                arrivals[len(new)] += 1
            elif new:
                first_token_seconds.append(now - last[index])
            outputs[index] += new
            last[index] = now
            if output.finished:
                del last[index]
    return {
        "seconds": time.perf_counter() - started,
        "outputs": outputs,
        "arrivals": arrivals,
        "first_token_seconds": first_token_seconds,
        "token_seconds": token_seconds,
    }


def end_with_parent() -> None:
    """Whoever started this may be killed, and a stopped process does not notice that its input ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    serve(json.loads(sys.argv[1]))
