"""Two replicas of one model: the same answers as one process, and what one of them may do to the other's requests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.ray_serve import ENGINE, PROMPT, Stream, body_of, post, wait_until

pytest.importorskip("ray")
from ray import serve

from specplug import LLM, SamplingParams
from specplug_ray import build_openai_app
from support import fragile

pytestmark = pytest.mark.slow
DELAY = 0.02


@pytest.fixture(scope="module")
def app(cluster: str) -> Iterator[str]:
    """Two replicas with steps of at least `DELAY` seconds."""
    engine = {
        **ENGINE,
        "speculative_config": {"method": "fragile", "num_speculative_tokens": 2, "delay": DELAY},
        "plugins": {"fragile": fragile.load_speculator},
        "strict": True,
    }
    deployment = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 1}
    ingress = {"ray_actor_options": {"num_cpus": 0.25}}
    args = {"model": "tiny", "engine": engine, "deployment": deployment, "ingress": ingress, "replica_timeout": 60}
    serve.run(build_openai_app(args), name="replicas")
    yield cluster
    serve.delete("replicas")


def replicas() -> list[dict[str, Any]]:
    handle = serve.get_deployment_handle("specplug-tiny", "replicas")
    answers = handle.broadcast("describe").results(timeout_s=20, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, dict)]


def wait_for_two(url: str) -> None:
    def are_there() -> bool:
        response = httpx.get(f"{url}/health", timeout=60)
        return response.status_code == 200 and response.json()["replicas"] == {"tiny": 2}

    wait_until(are_there)
    wait_until(lambda: len(replicas()) == 2)


@pytest.fixture(scope="module")
def expected() -> str:
    """The text of one process, for the longest request."""
    with LLM("tiny", **ENGINE) as llm:
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        return llm.generate(PROMPT, params)[0].outputs[0].text


def test_the_endpoints(app: str, expected: str) -> None:
    response = post(app, body_of(24, model="tiny"))
    assert response.status_code == 200
    text = response.json()["choices"][0]["text"]
    assert text
    assert expected.startswith(text)
    stream = Stream(app, body_of(24)).start().wait()
    assert stream.is_done
    assert stream.text == text
    assert len(stream.chunks) > 10  # as they are generated, not at the end

    assert post(app, body_of(4, model="other")).json()["error"]["code"] == "model_not_found"
    refused = post(app, body_of(4, unknown=1))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "unknown"
    broken = httpx.post(f"{app}/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert broken.json()["error"]["code"] == "invalid_json"

    models = httpx.get(f"{app}/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 2048)]
    assert httpx.get(f"{app}/v1/models/tiny").json() == models[0]
    assert httpx.get(f"{app}/v1/models/other").status_code == 404
    assert "playground" in httpx.get(app).text
    assert httpx.post(f"{app}/tokenize", json={"prompt": PROMPT}).json()["count"] > 1
    metrics = httpx.get(f"{app}/metrics").text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total")]
    assert {f'replica="{each["replica"]}"' in "".join(lines) for each in replicas()} == {True}
    assert sum(float(line.split()[-1]) for line in lines) >= 48


def test_a_client_that_leaves_and_an_abort_free_the_replica(app: str) -> None:
    with httpx.stream("POST", f"{app}/v1/completions", json=body_of(1500, stream=True), timeout=60) as response:
        lines = response.iter_lines()  # its end would close the connection
        next(lines)
        wait_until(lambda: httpx.get(f"{app}/load").json() == {"server_load": 1}, 10)
    wait_until(lambda: httpx.get(f"{app}/load").json() == {"server_load": 0}, 10)

    stream = Stream(app, body_of(1500, request_id="mine")).start()
    wait_until(lambda: stream.chunks, 20)
    assert httpx.post(f"{app}/abort", json={"request_id": "mine"}).json() == {"aborted": True}
    assert stream.wait(20).finish_reason == "abort"
    assert httpx.post(f"{app}/abort", json={"request_id": "mine"}).json() == {"aborted": False}


def test_a_replica_is_killed_during_streams(app: str, expected: str) -> None:
    wait_for_two(app)
    streams = [Stream(app, body_of(400)).start() for _ in range(6)]
    wait_until(lambda: all(stream.chunks for stream in streams), 30)
    victim = max(replicas(), key=lambda each: each["num_requests"])
    assert 0 < victim["num_requests"] < 6  # both have some
    killed = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)

    plain = [post(app, body_of(8)) for _ in range(10)]  # while it is gone
    assert [response.status_code for response in plain] == [200] * 10
    assert time.monotonic() - killed < 30

    for stream in streams:
        stream.wait(60)
    ended = [stream for stream in streams if stream.error is not None]
    assert len(ended) == victim["num_requests"]
    for stream in ended:
        assert stream.error is not None
        assert stream.error["code"] == "replica_ended"
        assert "send the request again" in stream.error["message"]
        assert stream.is_done
        assert stream.fault is None
        assert expected.startswith(stream.text)
    for stream in streams:
        if stream not in ended:
            assert stream.finish_reason == "length"
            assert stream.text == expected
    wait_for_two(app)
    assert victim["pid"] not in [each["pid"] for each in replicas()]


def test_a_request_without_a_stream_moves_to_another_replica(app: str, expected: str) -> None:
    wait_for_two(app)
    results: list[httpx.Response] = []
    bodies = [body_of(200) for _ in range(4)]
    threads = [threading.Thread(target=lambda body=body: results.append(post(app, body))) for body in bodies]
    for thread in threads:
        thread.start()
    wait_until(lambda: sum(each["num_requests"] for each in replicas()) == 4, 20)
    victim = max(replicas(), key=lambda each: each["num_requests"])
    os.kill(victim["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert [response.status_code for response in results] == [200] * 4
    assert all(expected.startswith(response.json()["choices"][0]["text"]) for response in results)
    wait_for_two(app)


def test_a_replica_whose_engine_fails_is_replaced(app: str, expected: str) -> None:
    wait_for_two(app)
    before = {each["pid"] for each in replicas()}
    streams = [Stream(app, body_of(400)).start() for _ in range(4)]
    wait_until(lambda: all(stream.chunks for stream in streams), 30)
    fatal = post(app, {"prompt": fragile.POISON, "max_tokens": 8})
    assert fatal.status_code == 503
    assert fatal.json()["error"]["code"] == "engine_stopped"
    assert "the device is gone" in fatal.json()["error"]["message"]

    assert [post(app, body_of(8)).status_code for _ in range(10)] == [200] * 10
    codes = [(stream.wait(60).error or {}).get("code") for stream in streams]
    assert set(codes) == {None, "engine_stopped"}
    assert all(stream.text == expected for stream in streams if stream.error is None)
    wait_for_two(app)
    assert len(before & {each["pid"] for each in replicas()}) == 1
