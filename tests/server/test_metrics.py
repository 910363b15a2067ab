"""/metrics: names, labels and values."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.serving import Live


def scrape(http: httpx.Client) -> dict[str, float]:
    """Sample name and its labels, without those that all have → value."""
    answer = http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            own = sorted((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine"))
            if sample.name.startswith("vllm:"):
                assert sample.labels["model_name"] == "tiny"
                assert sample.labels["engine"] == "0"
            found[sample.name + "".join(f",{k}={v}" for k, v in own)] = sample.value
    return found


def test_metrics_count_what_happens(server: Live, http: httpx.Client) -> None:
    before = scrape(http)
    prompt = "import os\nimport sys\nimport os\nimport sys\nimport"
    answer = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 24, "temperature": 0, "n": 2}).json()
    server.wait_idle()
    after = scrape(http)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    drafted = answer["metrics"]["speculative_decoding"]
    assert drafted["num_accepted_draft_tokens"] > 0
    assert more("vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert more("vllm:generation_tokens_total") == 48
    assert more("vllm:spec_decode_num_drafts_total") == drafted["num_spec_steps"]
    assert more("vllm:spec_decode_num_draft_tokens_total") == drafted["num_draft_tokens"]
    assert more("vllm:spec_decode_num_accepted_tokens_total") == drafted["num_accepted_draft_tokens"]
    assert more("specplug:spec_decode_num_draft_tokens_total,method=ngram") == drafted["num_draft_tokens"]
    assert more("specplug:spec_decode_num_accepted_tokens_total,method=ngram") == drafted["num_accepted_draft_tokens"]
    histogram = drafted["acceptance_histogram"]
    for position in range(len(histogram) - 1):
        name = f"vllm:spec_decode_num_accepted_tokens_per_pos_total,position={position}"
        assert more(name) == sum(histogram[position + 1 :])
        name = f"specplug:spec_decode_num_accepted_tokens_per_pos_total,method=ngram,position={position}"
        assert more(name) == sum(histogram[position + 1 :])
    assert more("specplug:spec_decode_num_drafts_total,method=ngram") == sum(histogram)
    assert more("vllm:time_to_first_token_seconds_count") == 2
    assert more("vllm:e2e_request_latency_seconds_count") == 2
    assert 24 < more("vllm:inter_token_latency_seconds_count") < 48
    assert more("vllm:request_generation_tokens_sum") == 48
    assert more("vllm:request_success_total,finished_reason=length") == 2
    assert more("specplug:http_responses_total,path=/v1/completions,status=200") == 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1
    assert more("specplug:engine_steps_total") > 0


def test_a_scanner_cannot_make_endless_labels(http: httpx.Client) -> None:
    for number in range(3):
        http.get(f"/v1/{number}")
    names = [name for name in scrape(http) if name.startswith("specplug:http_responses_total")]
    assert "specplug:http_responses_total,path=other,status=404" in names
    assert not any("/v1/0" in name for name in names)
