"""Runs the prompts of `specplug generate`."""

from __future__ import annotations

import json
import math
import re
import textwrap
import time
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.inputs import PromptLine
from specplug.cli.options import DEFAULTS, make_params
from specplug.cli.process import import_libraries
from specplug.cli.run.kernels import start_without_kernels
from specplug.cli.views.startup import StartupView
from specplug.cli.views.stats import Meter, show_meter, show_totals
from specplug.cli.views.text import TextView
from specplug.errors import GenerationError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.cli.terminal import Terminal
    from specplug.llm import LLM
    from specplug.outputs import CompletionOutput, RequestOutput
    from specplug.sampling.logprobs import Logprob
    from specplug.sampling.params import SamplingParams
    from specplug.stats import SpeculationStats

_PROMPT_INDEX = re.compile(r"^prompts\[(\d+)\]: ")
_HEADER_WIDTH = 60


@attrs.frozen
class GenerateJob:
    """The input of `specplug generate`.

    Attributes:
        target: the model.
        engine: keywords of `LLM`.
        prompts: to continue.
        sampling: keywords of `SamplingParams` from the command line.
        is_file: the prompts come from a file; each output gets a header.
        as_json: print JSON objects.
        stats: report speed and acceptance.
        quiet: hide startup steps and progress.
    """

    target: str
    engine: dict[str, Any]
    prompts: Sequence[PromptLine]
    sampling: dict[str, Any]
    is_file: bool
    as_json: bool
    stats: bool
    quiet: bool


def run_job(job: GenerateJob, out: Terminal, err: Terminal) -> None:
    """Starts the engine and generates.

    Args:
        job: the input.
        out: receives only the text.
        err: receives everything else.

    Raises:
        SpecplugError: the engine does not start, or a prompt is invalid.
    """
    with StartupView(err, quiet=job.quiet) as view:
        view.announce("importing PyTorch and Transformers")
        import_libraries()
        from specplug.llm import LLM

        if not job.is_file:
            start_without_kernels(job.engine, err, quiet=job.quiet)
        llm = LLM(job.target, on_step=view, **job.engine)
    with llm:
        params = _params(job, llm, err)
        try:
            if job.as_json or job.is_file or params[0].n > 1:
                _run_all(job, params, llm, out, err)
            else:
                _stream(job, params[0], llm, out, err)
        except RequestError as error:
            raise _with_location(error, job) from error
        _report_unverified(err, llm)


def _report_unverified(err: Terminal, llm: LLM) -> None:
    """Names the methods with a `verify` of their own, which core does not check, even if `quiet`."""
    for method in llm.engine.unverified_methods:
        err.paragraph(f"{method} verifies by a rule of its own, which specplug does not check.")


def _params(job: GenerateJob, llm: LLM, err: Terminal) -> list[SamplingParams]:
    """Merges the recommendations of the model, the options, and the parameters of each line; later ones take precedence."""
    from specplug.sampling.defaults import recommended_options
    from specplug.tiny import resolve_model

    recommended = recommended_options(resolve_model(llm.config.model), llm.config.revision, overridden=job.sampling)
    recommended.pop("max_tokens", None)
    used = {name: value for name, value in recommended.items() if name not in job.sampling}
    if used and not job.quiet:
        listed = ", ".join(f"{name}={value}" for name, value in used.items())
        err.paragraph(f"Sampling as the model's generation_config recommends: {listed}", style="dim")
    try:
        make_params(DEFAULTS, used)
    except RequestError as error:
        error.add_note(f"from generation_config.json of {job.target}; give the option to override it")
        raise
    params = []
    for line in job.prompts:
        given = {**DEFAULTS, **job.sampling, **line.options}
        own = dict(used)
        if "min_tokens" in own and given["max_tokens"] is not None:  # options take precedence over a recommendation
            own["min_tokens"] = min(own["min_tokens"], given["max_tokens"])
        params.append(make_params(DEFAULTS, own, job.sampling, line.options))
    return params


def _stream(job: GenerateJob, params: SamplingParams, llm: LLM, out: Terminal, err: Terminal) -> None:
    """Streams one completion."""
    shown = TextView(out, llm.engine.methods)
    if shown.legend and not job.quiet:
        err.paragraph(shown.legend, style="dim")
    meter = Meter()
    try:
        for piece in llm.stream(job.prompts[0].prompt, params, lora_request=job.prompts[0].lora):
            meter.add(piece)
            shown.show(piece)
    finally:
        shown.close()
    if job.stats:
        show_meter(err, meter, llm)


def _run_all(job: GenerateJob, params: list[SamplingParams], llm: LLM, out: Terminal, err: Terminal) -> None:
    """Generates all prompts together, batched by the engine."""
    started = time.perf_counter()
    failure: GenerationError | None = None
    try:
        outputs = llm.generate(
            [line.prompt for line in job.prompts],
            params,
            use_tqdm=err.is_live and not job.quiet,
            lora_request=[line.lora for line in job.prompts],
        )
    except GenerationError as error:  # raised after the other outputs are shown
        failure, outputs = error, error.outputs
    seconds = time.perf_counter() - started
    for number, output in enumerate(outputs, start=1):
        if job.as_json:
            for completion in output.outputs:
                out.line(completion_line(output, completion))
        else:
            _show_texts(out, number, output, has_text=not llm.config.skip_tokenizer_init)
    if job.stats:
        show_totals(err, outputs, seconds, llm)
    if failure is not None:
        raise failure


def _with_location(error: RequestError, job: GenerateJob) -> RequestError:
    """Replaces the index by which `LLM` names a prompt by its option, or its file and line."""
    text = str(error)
    if match := _PROMPT_INDEX.match(text):
        return RequestError(f"{job.prompts[int(match[1])].where}: {text[match.end() :]}")
    return RequestError(f"{job.prompts[0].where}: {text}" if len(job.prompts) == 1 else text)


def _show_texts(out: Terminal, number: int, output: RequestOutput, *, has_text: bool) -> None:
    """Prints each completion under a header; token ids without a tokenizer."""
    title = output.prompt if output.prompt is not None else f"{len(output.prompt_token_ids)} token ids"
    short = textwrap.shorten("".join(c if c.isprintable() else " " for c in title), _HEADER_WIDTH, placeholder=" ...")
    for completion in output.outputs:
        if number > 1 or completion.index:
            out.line()
        which = f", completion {completion.index + 1}" if len(output.outputs) > 1 else ""
        out.line(f"== {number}{which}: {short} ==", "bold")
        text = completion.text if has_text else " ".join(map(str, completion.token_ids))
        out.generated(text)
        if not text.endswith("\n"):
            out.line()


def completion_line(request: RequestOutput, completion: CompletionOutput) -> str:
    """Returns a completion as a line of JSON; keys are only added, never removed. Log probabilities are included on request."""
    item: dict[str, Any] = {
        "request_id": request.request_id,
        "index": completion.index,
        "prompt": request.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_cached_tokens": request.num_cached_tokens,
        "metrics": _metrics(completion.metrics),
        "unverified_methods": completion.unverified_methods,
    }
    if completion.error is not None:
        item["error"] = completion.error
    if completion.logprobs is not None:
        item["cumulative_logprob"] = _finite(completion.cumulative_logprob)
        item["logprobs"] = [_position(position) for position in completion.logprobs]
    if request.prompt_logprobs is not None:
        item["prompt_logprobs"] = [position and _position(position) for position in request.prompt_logprobs]
    return json.dumps(item)


def _metrics(stats: SpeculationStats) -> dict[str, Any]:
    return {
        **attrs.asdict(stats),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
    }


def _position(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "logprob": _finite(entry.logprob), "rank": entry.rank, "text": entry.decoded_token}
        for token, entry in position.items()
    ]


def _finite(value: float | None) -> float | None:
    """Replaces infinity, which JSON does not have, by null."""
    return value if value is not None and math.isfinite(value) else None
