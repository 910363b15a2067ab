"""specplug: speculative decoding for Hugging Face causal LMs, in which every method is a plugin.

Names are imported when they are first used, so that finding out about plugins never costs an import of torch. Where that is
what imports torch, its threads are set up for a machine that others use too (see `specplug.threads`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specplug import threads
from specplug.version import __version__

if TYPE_CHECKING:
    from specplug.async_llm import AsyncLLM
    from specplug.config.engine import EngineConfig
    from specplug.contract.hooks import hookimpl
    from specplug.contract.models import ModelHandle, TargetModel, WeightsHandle
    from specplug.contract.resources import KVLayer, MemoryBudget, MemoryRegion, Resources
    from specplug.contract.settings import SpeculativeConfig
    from specplug.contract.types import (
        Budget,
        DraftDistributions,
        EndReason,
        Outcome,
        Proposal,
        ProposalBatch,
        ProposalRow,
        Speculator,
        SpeculatorTraits,
        TokenView,
    )
    from specplug.contract.verification import TargetDistributions, Verdict, VerificationBatch, VerificationRow
    from specplug.engine.engine import Engine
    from specplug.engine.startup.report import StepReport
    from specplug.errors import (
        CheckpointError,
        ConfigurationError,
        DeadlineExceededError,
        EngineDeadError,
        GenerationError,
        InsufficientMemoryError,
        ModelOutputError,
        PluginError,
        QueueFullError,
        RequestError,
        SpecplugError,
        StartupError,
        UnsupportedModelError,
    )
    from specplug.llm import LLM
    from specplug.lora.request import LoRARequest
    from specplug.metrics import Counter, Gauge, Metric, Vector
    from specplug.model.kv_cache import BlockTable, KVCache, OwnTables
    from specplug.model.load.packing import pack_linears
    from specplug.model.paged import PagedBatch
    from specplug.model.pending import UpcomingTokens
    from specplug.model.rows import ForwardRow, TreeMask
    from specplug.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamedPiece
    from specplug.request import FinishReason, Request, StepOutput
    from specplug.sampling.argmax import argmax_with_prob
    from specplug.sampling.distributions import process
    from specplug.sampling.logprobs import Logprob, PositionLogprobs
    from specplug.sampling.params import SamplingParams
    from specplug.sampling.randomness import RowRandomness, sample
    from specplug.stats import DraftCounts, SpeculationStats
    from specplug.streams.stream import RequestStream
    from specplug.text.prompts import Message, Prompt
    from specplug.tiny import resolve_model
    from specplug.trace import StepTrace, TracedNode

# The same names at run time; a test compares the two lists.
_HOMES = {
    "specplug.async_llm": ("AsyncLLM",),
    "specplug.config.engine": ("EngineConfig",),
    "specplug.contract.hooks": ("hookimpl",),
    "specplug.contract.resources": (
        "KVLayer",
        "MemoryBudget",
        "MemoryRegion",
        "Resources",
    ),
    "specplug.contract.models": ("ModelHandle", "TargetModel", "WeightsHandle"),
    "specplug.contract.verification": ("TargetDistributions", "Verdict", "VerificationBatch", "VerificationRow"),
    "specplug.contract.settings": ("SpeculativeConfig",),
    "specplug.contract.types": (
        "Budget",
        "DraftDistributions",
        "EndReason",
        "Outcome",
        "Proposal",
        "ProposalBatch",
        "ProposalRow",
        "Speculator",
        "SpeculatorTraits",
        "TokenView",
    ),
    "specplug.engine.engine": ("Engine",),
    "specplug.engine.startup.report": ("StepReport",),
    "specplug.trace": (
        "StepTrace",
        "TracedNode",
    ),
    "specplug.errors": (
        "CheckpointError",
        "ConfigurationError",
        "DeadlineExceededError",
        "EngineDeadError",
        "GenerationError",
        "InsufficientMemoryError",
        "ModelOutputError",
        "PluginError",
        "QueueFullError",
        "RequestError",
        "SpecplugError",
        "StartupError",
        "UnsupportedModelError",
    ),
    "specplug.llm": ("LLM",),
    "specplug.lora.request": ("LoRARequest",),
    "specplug.metrics": (
        "Counter",
        "Gauge",
        "Metric",
        "Vector",
    ),
    "specplug.model.kv_cache": (
        "BlockTable",
        "KVCache",
        "OwnTables",
    ),
    "specplug.model.load.packing": ("pack_linears",),
    "specplug.model.paged": ("PagedBatch",),
    "specplug.model.pending": ("UpcomingTokens",),
    "specplug.model.rows": (
        "ForwardRow",
        "TreeMask",
    ),
    "specplug.outputs": (
        "CompletionOutput",
        "RequestMetrics",
        "RequestOutput",
        "StreamedPiece",
    ),
    "specplug.request": (
        "FinishReason",
        "Request",
        "StepOutput",
    ),
    "specplug.sampling.distributions": ("process",),
    "specplug.sampling.argmax": ("argmax_with_prob",),
    "specplug.sampling.logprobs": (
        "Logprob",
        "PositionLogprobs",
    ),
    "specplug.sampling.params": ("SamplingParams",),
    "specplug.sampling.randomness": (
        "RowRandomness",
        "sample",
    ),
    "specplug.stats": (
        "DraftCounts",
        "SpeculationStats",
    ),
    "specplug.streams.stream": ("RequestStream",),
    "specplug.text.prompts": (
        "Message",
        "Prompt",
    ),
    "specplug.tiny": ("resolve_model",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'specplug' has no attribute '{name}'")
    with threads.importing():
        return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
