"""A specplug speculator inside vLLM, served by Ray Serve LLM: for a model that needs several GPUs or machines.

Not run by specplug's tests: it needs GPUs, and `pip install 'ray[llm]' specplug-vllm specplug-ngram` on every node.
`specplug vllm-config` prints the values of `speculative_config` and `additional_config` for a configuration of specplug.

    serve run vllm_app:app
"""

from ray.serve.llm import LLMConfig, build_openai_app

config = LLMConfig(
    model_loading_config={"model_id": "llama-70b", "model_source": "meta-llama/Llama-3.1-70B-Instruct"},
    deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
    accelerator_type="H100",
    engine_kwargs={
        "tensor_parallel_size": 4,
        # These keys are vLLM's engine arguments; Ray passes them on.
        "speculative_config": {
            "method": "custom_class",
            "model": "specplug_vllm.SpecplugProposer",
            "num_speculative_tokens": 5,
        },
        "additional_config": {"specplug": {"method": "ngram", "prompt_lookup_min": 2}},
    },
)
app = build_openai_app({"llm_configs": [config]})
