"""What users do wrong, and what they should then be told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specplug import LLM, SamplingParams
from support.models import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = "--speculative-config"
GENERATE = ("generate", "tiny", "--prompt", "import os", "--dtype", "float32", "--device", "cpu")
PLAN = ("plan", "tiny", "--device", "cpu")

# Options after `generate tiny --prompt ...` → what the one line says. `{folder}` is the folder of `bad_files.make_files`.
OPTIONS: list[tuple[tuple[str, ...], str]] = [
    # speculative configuration
    ((CONFIG, '{"method": lookup}'), "--speculative-config: not valid JSON at line 1, column 12"),
    ((CONFIG, "{folder}/bad.json"), "bad.json: not valid JSON at line 2, column 13"),
    ((CONFIG, "{folder}/latin.json"), "latin.json: not a text file (it is not UTF-8)"),
    ((CONFIG, "{folder}"), "cannot be read: Is a directory"),
    ((CONFIG, "nowhere.json"), "'nowhere.json' is neither a JSON object nor a file; write it like '{"),
    ((CONFIG, '["lookup"]'), 'expected a JSON object such as {"method": "ngram"}, got ["lookup"]'),
    ((CONFIG, ""), "--speculative-config: not valid JSON"),
    ((CONFIG, '{"method": "lookup", "method": "lookup"}'), "the key 'method' is given twice"),
    (
        (CONFIG, '{"num_speculative_tokens": 3}'),
        "needs 'method', the name of an installed speculator (see: specplug list)",
    ),
    ((CONFIG, '{"method": 5}'), "needs 'method'"),
    (
        (CONFIG, '{"method": "lookup", "num_speculative_tokens": 0}'),
        "num_speculative_tokens=0: expected an integer of at",
    ),
    (
        (CONFIG, '{"method": "lookup", "num_speculative_tokens": "3"}'),
        "num_speculative_tokens='3': expected an integer",
    ),
    ((CONFIG, '{"method": "lookup", "fallback": 5}'), "expected a mapping, got 5"),
    ((CONFIG, '{"method": "lookup", "windw": 3}'), "unknown key 'windw' for method 'lookup'; did you mean 'window'?"),
    ((CONFIG, '{"method": "lokup"}'), "no speculator named 'lokup'; did you mean 'lookup'? (installed: "),
    (
        (CONFIG, '{"method": "quite_new"}'),
        "'quite_new'; if a package provides it: pip install specplug-quite-new (installed: ",
    ),
    ((CONFIG, '{"method": "lookup", "fallback": {"method": "zzz"}}'), "no speculator named 'zzz'"),
    ((CONFIG, '{"method": "future"}'), "'future' of package acme-future is incompatible: needs specplug>=9"),
    (
        (CONFIG, '{"method": "broken"}'),
        "of package acme-broken cannot be loaded: ModuleNotFoundError: No module named 'missing_'",
    ),
    ((CONFIG, '{"method": "lookup"}', "--deny-plugin", "acme-lookup"), "is blocked: on the deny-list"),
    ((CONFIG, '{"method": "lookup"}', "--allow-plugin", "other"), "is blocked: not on the allow-list"),
    # sampling
    (("--temperature", "-1"), "sampling parameter temperature=-1.0: expected a number from 0 to 1e+20"),
    (("--temperature", "nan"), "sampling parameter temperature=nan"),
    (("--top-p", "0"), "sampling parameter top_p=0.0: expected a number above 0, at most 1"),
    (("--top-k", "-5"), "sampling parameter top_k=-5"),
    (("--min-p", "2"), "sampling parameter min_p=2.0: expected a number from 0 to 1"),
    (("--repetition-penalty", "0"), "sampling parameter repetition_penalty=0.0: expected a number from 1e-08 to 1e+08"),
    (("--presence-penalty", "3"), "sampling parameter presence_penalty=3.0: expected a number from -2 to 2"),
    (("--frequency-penalty", "inf"), "sampling parameter frequency_penalty=inf"),
    (("--max-tokens", "0"), "sampling parameter max_tokens=0: expected an integer of at least 1"),
    (("--min-tokens", "200"), "sampling parameter min_tokens=200: expected at most max_tokens=128"),
    (("--n", "0"), "sampling parameter n=0"),
    (("--seed", "99999999999999999999"), "sampling parameter seed=99999999999999999999: expected a 64-bit integer"),
    (("--json", "--logprobs", "-2"), "sampling parameter logprobs=-2"),
    (("--num-speculative-tokens", "-1"), "sampling parameter num_speculative_tokens=-1"),
    (("--stop", ""), "sampling parameter stop=('',): expected a non-empty string"),
    (("--logit-bias", "{42: 1}"), "--logit-bias: not valid JSON at line 1, column 2"),
    (("--logit-bias", "[42]"), "--logit-bias: expected a JSON object of token ids and numbers"),
    (("--logit-bias", '{"x": 1}'), "sampling parameter logit_bias={'x': 1}: expected a mapping of token ids"),
    (("--logit-bias", '{"99999": 1}'), "logit_bias names token id 99999, outside the vocabulary of 4,096"),
    (("--allowed-token-id", "-1"), "sampling parameter allowed_token_ids=(-1,)"),
    (("--allowed-token-id", "99999"), "allowed_token_ids names token id 99999, outside the vocabulary of 4,096"),
    (("--stop-token-id", "4096"), "stop_token_ids names token id 4096, outside the vocabulary of 4,096"),
    # engine
    (("--memory", "lots"), "memory='lots': expected a size such as '8GiB'"),
    (("--memory", "0"), "memory='0': expected a size"),
    (("--memory", "1MiB"), "the budget is 1.0 MiB; raise memory, or take smaller weights"),
    (("--memory", "23MiB", "--max-model-len", "2000"), "one sequence of 2,000 tokens needs"),
    (
        (CONFIG, '{"method": "lookup", "num_speculative_tokens": 1000000000}'),
        "1,000,000,001 KV entries of each sequence are for drafts: lower num_speculative_tokens",
    ),
    (("--max-model-len", "0"), "max_model_len=0: expected an integer of at least 1"),
    (("--max-model-len", "9999999"), "max_model_len=9,999,999 is more than the 2,048 positions"),
    (("--max-num-seqs", "-1"), "max_num_seqs=-1"),
    (("--block-size", "0"), "block_size=0"),
    (("--max-num-seqs", "9", "--max-num-batched-tokens", "8"), "max_num_batched_tokens=8 is less than max_num_seqs=9"),
    (("--dtype", "int3"), "dtype 'int3' is not one of auto, float32, float16, bfloat16, float64"),
    (("--device", "quantum"), "device='quantum' is not the name of a device; use auto, cpu, cuda or cuda:N"),
    (("--device", "meta"), "device='meta' is not supported; use auto"),
    # prompts
    (("--prompt", ""), "--prompt: the prompt is empty"),
    (("--prompt", "a\udcff"), "--prompt contains the byte 0xFF, which is not UTF-8, at character 2 ('\\udcff')"),
    (("--max-model-len", "4", "--prompt", "one two three four five six"), "the longest sequence is 4 tokens"),
]

# A file of prompts → what the one line says after the file's name.
PROMPT_FILES: list[tuple[bytes, str]] = [
    (b'"a"\n\n{"prompt": }\n', ", line 3: not valid JSON at column 12"),
    (b'"a"\n\xff\xfe\n', ", line 2: not UTF-8 at byte 1"),
    (b"just text\n", ", line 1: not valid JSON at column 1"),
    (b"\n \n", " contains no prompt; write one JSON string"),
    (b'"a"\n12\n', ", line 2: expected a JSON string, or an object with 'prompt' or 'prompt_token_ids', got 12"),
    (b'{"promt": "a"}\n', ", line 1: unknown key 'promt'; did you mean 'prompt'?"),
    (b'{"prompt": "a", "prompt_token_ids": [1]}\n', ", line 1: give exactly one of 'prompt' and 'prompt_token_ids'"),
    (b"{}\n", ", line 1: give exactly one of 'prompt' and 'prompt_token_ids'"),
    (b'"a"\n{"prompt": ""}\n', ", line 2: the prompt is empty: the tokenizer gives no token for it"),
    (b'{"prompt": 5}\n', ", line 1: 'prompt': expected a string, got 5"),
    (
        b'"a"\n"b\\ud800"\n',
        ", line 2: 'prompt' contains a lone surrogate at character 2 ('\\ud800'), so it is not valid",
    ),
    (b'{"prompt": "a", "prompt": "b"}\n', ", line 1: the key 'prompt' is given twice"),
    (b'{"prompt_token_ids": [1, "2"]}\n', ", line 1: 'prompt_token_ids': expected a list of at least one token id"),
    (b'{"prompt_token_ids": []}\n', ", line 1: 'prompt_token_ids': expected a list of at least one token id"),
    (b'{"prompt": "a", "sampling_params": 1}\n', ", line 1: 'sampling_params': expected an object, got 1"),
    (
        b'"a"\n{"prompt": "a", "sampling_params": {"temprature": 1}}\n',
        ", line 2: unknown sampling parameter 'temprature'; did you mean 'temperature'?",
    ),
    (b'{"prompt": "a", "sampling_params": {"stop": 5}}\n', ", line 1: sampling parameter stop=5: expected a non-empty"),
    (b'{"prompt": "a", "sampling_params": {"top_p": "1"}}\n', ", line 1: sampling parameter top_p='1'"),
    (b'"a"\n\n{"prompt_token_ids": [1, 4096]}\n', ", line 3: token id 4096 at position 1 is outside the vocabulary"),
    (b'"a"\n{"prompt_token_ids": [%s1]}\n' % (b"1, " * 2100), ", line 2: the prompt has 2,101 tokens, the longest"),
]

# A target → what the one line says. The folders are those of `bad_files.make_targets`.
TARGETS: list[tuple[str, str]] = [
    ("./nowhere", "'./nowhere' is not a folder with a checkpoint; give a folder or a hub name"),
    ("", "the model's name is empty; give a folder"),
    ("tinny", "there is no model 'tinny'; did you mean 'tiny', the embedded one?"),
    ("nobody/nothing", "'nobody/nothing' is not a local folder, and could not be downloaded from the hub"),
    ("not a name", "'not a name' is not a local folder, and could not be downloaded from the hub"),
    ("{folder}/empty", "empty has no config.json; it is not a Hugging Face checkpoint"),
    ("{folder}/unweighted", "unweighted has no safetensors weights"),
    ("{folder}/pickled", "has no safetensors weights ('pytorch_model.bin' is a pickle: convert it to safetensors)"),
    ("{folder}/truncated", "model.safetensors is truncated: "),
    ("{folder}/garbled", "model.safetensors is damaged: its header"),
    ("{folder}/short", "short: 1 weights are missing, first 'model.norm.weight'"),
    (
        "{folder}/reshaped",
        "another shape than config.json says, first 'model.layers.0.mlp.down_proj.weight': [32, 48], not [32, 40]",
    ),
    ("{folder}/sharded", "sharded lacks 1 of 1 weight files, first 'model-00001.safetensors'"),
    ("{folder}/misindexed", "model.safetensors.index.json is damaged: JSONDecodeError"),
    ("{folder}/misconfigured", "config.json is damaged: JSONDecodeError"),
    ("{folder}/unheard", "config.json cannot be used: model type 'unheard_of' is unknown to Transformers"),
    ("{folder}/mute", "mute has no tokenizer that can be loaded"),
    ("{folder}/misguided", "generation_config.json is damaged: "),
]

# Arguments that the command line does not take → what the one line says.
USAGE: list[tuple[tuple[str, ...], str]] = [
    (("nosuch",), "No such command 'nosuch' (see: specplug --help)"),
    (("--nosuch",), "No such option '--nosuch' (see: specplug --help)"),
    (("list", "--nosuch"), "No such option '--nosuch' (see: specplug list --help)"),
    (("generate",), "Missing argument 'TARGET' (see: specplug generate --help)"),
    (("plan",), "Missing argument 'TARGET' (see: specplug plan --help)"),
    (("generate", "tiny"), "Missing option '--prompt' or '--prompts'"),
    (("generate", "tiny", "--prompt", "x", "--prompts", "y"), "--prompt and --prompts exclude each other"),
    ((*GENERATE, "--logprobs", "1"), "--logprobs and --prompt-logprobs require --json"),
    ((*GENERATE, "--max-tokens", "many"), "Invalid value for '--max-tokens': 'many' is not a valid integer"),
    ((*GENERATE, "--temperature", "hot"), "Invalid value for '--temperature': 'hot' is not a valid float"),
    ((*GENERATE, "--temperature"), "Option '--temperature' requires an argument"),
    ((*GENERATE, "again"), "Got unexpected extra argument 'again'; give the prompt with --prompt, in quotes (see: "),
    (("generate", "tiny", "some text"), "extra argument 'some text'; give the prompt with --prompt, in quotes (see: "),
    (("generate", "tiny", "some", "text"), "extra argument 'some text'; give the prompt with --prompt, in quotes"),
    ((*GENERATE, "--tempratur", "1"), "No such option '--tempratur'"),
    ((*PLAN, "--max-num-seqs", "x"), "Invalid value for '--max-num-seqs'"),
    (("demo", "--max-tokens", "1"), "1 is not in the range x>=2"),
    (("demo", "--num-speculative-tokens", "0"), "0 is not in the range x>=1"),
]

# What is asked of a running engine of 64 tokens' vocabulary without a tokenizer → the error's text.
REQUESTS: list[tuple[Callable[[LLM], Any], str]] = [
    (lambda llm: llm.generate({"prompt_token_ids": []}), "the prompt is empty; it needs at least one token"),
    (lambda llm: llm.generate([[3, VOCABULARY]]), "token id 64 at position 1 is outside the vocabulary of 64"),
    (lambda llm: llm.generate([[3, -1]]), "token id -1 at position 1 is outside the vocabulary"),
    (lambda llm: llm.generate([[3, 1.5]]), "token id 1.5 at position 1 is not an integer"),
    (lambda llm: llm.generate([[3] * 100]), "the prompt has 100 tokens, the longest sequence is 32 tokens"),
    (lambda llm: llm.generate("text"), "a prompt given as text needs a tokenizer, and the engine has none"),
    (lambda llm: llm.generate({"promt": "x"}), "has the key 'prompt' or 'prompt_token_ids', not 'promt'"),
    (lambda llm: llm.generate([3.5]), "a prompt is text, a list of token ids or a mapping, not float"),
    (
        lambda llm: llm.generate([[3]], [SamplingParams()] * 2),
        "2 sampling_params for 1 prompts; give one for all, or one",
    ),
    (
        lambda llm: llm.generate([[3]], lora_request="x"),
        "adapters are off; start with enable_lora=True or lora_modules",
    ),
    (
        lambda llm: llm.generate([[3]], SamplingParams(stop="x")),
        "stop strings need a tokenizer, and the engine has none",
    ),
    (lambda llm: llm.generate([[3]], SamplingParams(bad_words=["x"])), "bad_words needs a tokenizer"),
    (lambda llm: llm.generate([[3]], SamplingParams(allowed_token_ids=[64])), "allowed_token_ids names token id 64"),
    (lambda llm: llm.chat([{"role": "user", "content": "x"}]), "chat needs a tokenizer"),
    (lambda llm: llm.get_tokenizer(), "get_tokenizer() needs a tokenizer"),
    (lambda llm: SamplingParams(logit_bias=[1]), "sampling parameter logit_bias=[1]: expected a mapping of token ids"),
    (lambda llm: SamplingParams(stop_token_ids=5), "sampling parameter stop_token_ids=5: expected a list of token ids"),
    (
        lambda llm: SamplingParams(structured_outputs={}),
        "structured_outputs is not supported: there is no grammar backend",
    ),
]

# What an engine is started with → the error's text.
STARTS: list[tuple[dict[str, Any], str]] = [
    ({"max_num_seq": 4}, "LLM has no option 'max_num_seq'; did you mean 'max_num_seqs'?"),
    (
        {"data_parallel_size": 2},
        "vLLM's option data_parallel_size=2 is not supported: replicas run on Ray Serve, with specplug-ray",
    ),
    (
        {"quantization": "awq"},
        "quantization='awq': expected 'int8' or None (a quantised checkpoint needs no option: its quantization_config says",
    ),
    ({"kv_cache_memory_bytes": 1}, "kv_cache_memory_bytes is not supported: give memory"),
    ({"memory": -1}, "memory=-1: expected a positive size such as '8GiB'"),
    ({"memory": True}, "memory=True: expected a size"),
    ({"block_size": "16"}, "block_size='16': expected an integer of at least 1"),
    ({"chain_verification": "none"}, "chain_verification='none': expected 'block' or 'standard'"),
    ({"speculative_config": "ngram"}, "speculative_config: expected a mapping, got 'ngram'"),
    (
        {"speculative_config": {"method": "x"}, "plugins": {"x": 5}},
        "plugins['x']=5: expected a function of (config, target)",
    ),
    ({"speculative_config": {"method": "x"}, "plugins": {"x": lambda config, target: None}}, "returned no speculator"),
    (
        {"speculative_config": {"method": "x"}, "plugins": {"x": lambda config, target: 5}},
        "has no @hookimpl method 'propose'",
    ),
    ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float32"),
]
