"""`--worker-cls specplug_vllm.Worker`: vLLM's worker, whose model runner also hands the target's states to the proposer.

vLLM calls a proposer of `custom_class` with tokens alone. What else its own proposers get, the model runner has when it calls
them; so this worker extends its runner by two methods, and changes nothing for other methods of speculation.
"""

from __future__ import annotations

from typing import Any

from specplug import ConfigurationError
from specplug_vllm.states import TargetStep
from specplug_vllm.versions import check_vllm

check_vllm()


def _worker_class() -> Any:
    """The worker that vLLM would take on this machine."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    if current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker as GPUWorker

        return GPUWorker
    raise ConfigurationError(
        f"--worker-cls specplug_vllm.Worker is for CPUs and GPUs, and vLLM runs on {current_platform.device_name}; without "
        "it, speculators that need no target states run there"
    )


_Base: Any = _worker_class()


class Worker(_Base):
    """vLLM's worker, with target states and draft probabilities for the speculators of `SpecplugProposer`."""

    def init_device(self) -> None:
        """Makes the model runner, and with it the proposer."""
        super().init_device()
        runner = self.model_runner
        if hasattr(getattr(runner, "drafter", None), "attach_runner"):
            runner.__class__ = type("SpecplugModelRunner", (_HandsStatesOver, type(runner)), {})
            runner.prepare_states()


class _HandsStatesOver:
    """What is added to vLLM's model runner."""

    drafter: Any
    input_batch: Any
    vllm_config: Any

    def prepare_states(self) -> None:
        """Asks the target for the states that speculators declared; called before it is loaded."""
        self.drafter.attach_runner(self)
        layers = self.drafter.aux_layers
        self.use_aux_hidden_state_outputs = bool(layers)
        # The outputs of a compiled target depend on it, so the key of vLLM's compile cache must.
        additional = {**self.vllm_config.additional_config, "specplug_states": list(layers)}
        self.vllm_config.additional_config = additional

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...]:
        layers: tuple[int, ...] = self.drafter.aux_layers
        return layers

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        *others: Any,
    ) -> Any:
        """Hands the step over, lets vLLM call `propose`, and gives its sampler the distributions of the drafts."""
        drafted = scheduler_output.scheduled_spec_decode_tokens
        step = TargetStep(
            num_scheduled=scheduler_output.num_scheduled_tokens,
            num_drafted={name: len(tokens) for name, tokens in drafted.items()},
            final=hidden_states,
            layers=dict(zip(self.drafter.aux_layers, aux_hidden_states or (), strict=True)),
        )
        self.drafter.receive(step)
        drafts = super().propose_draft_token_ids(  # type: ignore[misc]
            scheduler_output,
            sampled_token_ids,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            *others,
        )
        self._draft_probs = self.drafter.take_draft_probs()
        self._draft_prob_req_ids = None if self._draft_probs is None else list(self.input_batch.req_ids)
        return drafts
