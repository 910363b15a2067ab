"""Every causal language model that the installed Transformers knows, tiny and random, against its own `generate`.

    python benchmarks/architectures.py --table docs/architectures.md

Each model type runs in every arrangement of full and sliding-window layers that its configuration allows, greedily in
float32: plain, and with a speculator whose drafts are right now and then. The outcome is `equal` (token for token), `refused`
(with specplug's reason) or `fault`, which must not occur. Prompts are longer than the windows.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
from tiny_configs import VOCABULARY, layer_patterns, tiny_config

NEW_TOKENS = 12
PROMPT_LENGTHS = (9, 17, 30)
MARGIN = 2e-4  # where the two best logits are closer, two correct programs may differ
SECONDS = 240
HEAD = """# Architectures

A causal language model runs if each of its layers attends through Transformers' attention interface, with a causal or a
sliding-window mask, or carries [recurrent state](memory.md#recurrent-state) through Transformers' functions for short
convolutions, gated delta rules and state-space scans. There is no list of supported models:

- **At the start, before weights are read,** the model is traced. The trace learns the window of each layer from the mask that
  the model itself builds, and refuses what is no such layer.
- **The first time a configuration is met** with these versions of torch and Transformers, the parity probe compares logits with
  the model's own attention, over prefill, decode and verification steps. It takes a narrow copy: the same code and layers in
  float32, with random weights, divided widths and windows of four tokens, so that short rows reach beyond every window and no
  difference is rounding. Then the attention of every loaded layer is compared with its formula, in the dtype and on the device
  that will be used.

This table was made by `python benchmarks/architectures.py --table docs/architectures.md` with Transformers {version}: a tiny
random model of each type, in the arrangement of full and sliding-window layers that is its default and in the others that its
configuration allows, decoded greedily in float32 and compared token for token with `generate`, plain and with speculation.
{equal} types are equal, {refused} are refused. Types that join a text model with others (images, sound) were run on text.

A model whose forward branches on the values of tensors (jetmoe, longcat_flash) is traced on zeros instead of shapes. Its
forward is not compiled or captured in CUDA graphs, and it takes no adapters.

Attention in chunks (Llama 4) runs up to the length of one chunk, 8,192 tokens for the published models. Within it, it is causal
attention; `max_model_len` is bounded by it. Longer sequences need a mask that the paged kernels do not have.

| model type | layers | outcome | reason |
|---|---|---|---|
"""


@attrs.frozen
class Outcome:
    """What became of one model."""

    model_type: str
    pattern: str
    outcome: str
    reason: str = ""


class Guesser:
    """Drafts the known continuation, now and then with a random token in it."""

    def __init__(self, known: list[list[int]]) -> None:
        from specplug import SpeculatorTraits

        self.traits = SpeculatorTraits(token_only=True)
        self._known = known
        self._random = random.Random(0)

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """So many tokens that may follow."""
        for sequence in self._known:
            if sequence[: len(tokens)] == tokens:
                following = sequence[len(tokens) : len(tokens) + count]
                return [self._random.randrange(VOCABULARY) if self._random.random() < 0.3 else t for t in following]
        return [self._random.randrange(VOCABULARY) for _ in range(count)]


def _speculator(known: list[list[int]]) -> Any:
    from specplug import Proposal, hookimpl

    class Speculator(Guesser):
        @hookimpl
        def propose(self, batch: Any) -> Any:
            budgets = [min(row.budget.max_nodes, row.budget.max_depth) for row in batch.rows]
            return Proposal([self.guess(list(row.tokens), n) for row, n in zip(batch.rows, budgets, strict=True)])

    return Speculator(known)


def try_model(model_type: str, pattern: str, folder: Path) -> Outcome:
    """Makes, generates and compares one model."""
    from specplug import LLM, SamplingParams, SpecplugError

    expected, trouble = _reference(model_type, layer_patterns(model_type)[pattern], folder)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [prompt for prompt, _ in expected] or [[5, 6, 7]]
    options = {
        "plain": {},
        "speculation": {
            "plugins": {"guesser": lambda config, target: _speculator([p + o for p, o in expected])},
            "speculative_config": {"method": "guesser", "num_speculative_tokens": 4},
        },
    }
    for how, own in options.items():
        try:
            with LLM(
                folder, skip_tokenizer_init=True, strict=True, memory="96MiB", block_size=4, compile=False, **own
            ) as llm:
                outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        except SpecplugError as error:
            kind = "fault" if type(error).__name__ == "StartupError" or how != "plain" else "refused"
            return Outcome(model_type, pattern, kind, str(error))
        if trouble:
            return Outcome(model_type, pattern, "fault", f"it runs, but Transformers cannot: {trouble}")
        for output, (_, wanted) in zip(outputs, expected, strict=True):
            if output[: len(wanted)] != wanted:
                return Outcome(model_type, pattern, "fault", f"{how}: {output[: len(wanted)]}, not {wanted}")
    return Outcome(model_type, pattern, "equal")


def _reference(model_type: str, changes: dict[str, Any], folder: Path) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Saves a model; prompts and what `generate` makes of them as far as it is decided, or why it makes nothing."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    try:
        config = tiny_config(model_type, **changes)
    except Exception as error:  # then at least the start is tried, with the default configuration
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
        return [], f"{type(error).__name__}: {error}"
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.is_floating_point() and parameter.std() < 0.1:
                    parameter.normal_(0, 0.4)
        model.save_pretrained(folder)
    except Exception as error:
        config.save_pretrained(folder)
        save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
        return [], f"{type(error).__name__}: {error}"
    try:
        return _decided(model), ""
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def _decided(model: Any) -> list[tuple[list[int], list[int]]]:
    import torch
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(0)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    model.generation_config = settings
    found: list[tuple[list[int], list[int]]] = []
    for length in PROMPT_LENGTHS * 4:
        prompt = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        margins = [(top[0] - top[1]).item() for top in (step[0].topk(2).values for step in out.logits)]
        sure = next((i for i, margin in enumerate(margins) if not margin > MARGIN), NEW_TOKENS)
        if sure > NEW_TOKENS // 2:
            found.append((prompt[0].tolist(), out.sequences[0, length : length + sure].tolist()))
        if len(found) == len(PROMPT_LENGTHS):
            return found
    raise ValueError(f"only {len(found)} decided prompts")


def _work(connection: Connection) -> None:
    """One process: takes cases until there are none."""
    import warnings

    import torch
    from transformers.utils import logging

    from specplug import native

    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    native.load()  # compiling the kernels is no part of any case's time
    gc.freeze()  # collections go through what each case makes, not through all of PyTorch
    connection.send("ready")
    while (case := connection.recv()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            try:
                outcome = try_model(*case, place)
            except BaseException as error:
                text = "".join(traceback.format_exception_only(error)).strip()
                outcome = Outcome(*case, "fault", text)
            connection.send(attrs.evolve(outcome, reason=outcome.reason.replace(str(place), "the folder")))


def run_cases(cases: list[tuple[str, str]], seconds: float = SECONDS) -> list[Outcome]:
    """All cases, one after the other, in a process of their own that a case which takes too long ends."""
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    process: Any = None
    for case in cases:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            ours.recv()
        ours.send(case)
        try:
            outcomes.append(ours.recv() if ours.poll(seconds) else Outcome(*case, "fault", f"no end after {seconds} s"))
        except EOFError:
            outcomes.append(Outcome(*case, "fault", "the process died"))
        print(*attrs.astuple(outcomes[-1]), sep=" | ", flush=True)
        if outcomes[-1].reason == "the process died" or outcomes[-1].reason.startswith("no end"):
            process.kill()
            process.join()
            process = None
    if process is not None:
        ours.send(None)
        process.join()
    return outcomes


def all_cases(types: list[str]) -> list[tuple[str, str]]:
    """Every type in every arrangement of its layers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    chosen = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not types or name in types]
    return [(name, pattern) for name in sorted(chosen) for pattern in layer_patterns(name)]


def as_table(outcomes: list[Outcome]) -> str:
    """The page of the docs: a row per type and outcome."""
    import transformers

    grouped: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.model_type, outcome.outcome, outcome.reason), []).append(outcome.pattern)
    lines = [
        f"| {name} | {', '.join(patterns)} | {outcome} | {_cell(reason)} |"
        for (name, outcome, reason), patterns in grouped.items()
    ]
    equal = {name for name, outcome, _ in grouped if outcome == "equal"}
    refused = {name for name, outcome, _ in grouped if outcome == "refused"} - equal
    head = HEAD.format(version=transformers.__version__, equal=len(equal), refused=len(refused))
    return head + "\n".join(lines) + "\n"


def _cell(reason: str) -> str:
    text = " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 240 else text[:237] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--table", type=Path, help="write a page with the table here")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    arguments = parser.parse_args()
    outcomes = run_cases(all_cases(arguments.types))
    if arguments.json:
        arguments.json.write_text(
            json.dumps([attrs.asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8"
        )
    if arguments.table:
        arguments.table.write_text(as_table(outcomes), encoding="utf-8")
    faults = [outcome for outcome in outcomes if outcome.outcome == "fault"]
    raise SystemExit(f"{len(faults)} faults" if faults else 0)


if __name__ == "__main__":
    main()
