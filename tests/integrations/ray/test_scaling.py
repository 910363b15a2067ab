"""From one replica to two and back under load, and which replica gets a request."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.ray_serve import ENGINE, Stream, body_of, post, wait_until

pytest.importorskip("ray")
from ray import serve

from specplug_ray import build_openai_app
from support import fragile

pytestmark = pytest.mark.slow
DELAY = 0.02
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 4,
    "upscale_delay_s": 1,
    "downscale_delay_s": 3,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
}
PREFIX_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
"""Where the class of `ray.serve.llm.request_router` is from, which cannot be imported without vLLM."""


def deploy(routing: str = "load", **deployment: Any) -> None:
    engine = {
        **ENGINE,
        "speculative_config": {"method": "fragile", "num_speculative_tokens": 2, "delay": DELAY},
        "plugins": {"fragile": fragile.load_speculator},
    }
    options = {"ray_actor_options": {"num_cpus": 0.5}, "graceful_shutdown_wait_loop_s": 0.5, **deployment}
    ingress = {"ray_actor_options": {"num_cpus": 0.25}}
    args = {"model": "tiny", "engine": engine, "deployment": options, "ingress": ingress, "routing": routing}
    serve.run(build_openai_app(args), name="scaling")


@pytest.fixture(scope="module")
def app(cluster: str) -> Iterator[str]:
    """One replica, two if there is more to do."""
    deploy(autoscaling_config=SCALING)
    yield cluster
    serve.delete("scaling")


def replicas() -> list[dict[str, Any]]:
    handle = serve.get_deployment_handle("specplug-tiny", "scaling")
    answers = handle.broadcast("describe").results(timeout_s=20, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, dict)]


def states() -> dict[str, int]:
    """How many replicas Ray counts in each state. Unlike `replicas`, it sends them no requests, which count as load."""
    states = serve.status().applications["scaling"].deployments["specplug-tiny"].replica_states
    return {str(getattr(state, "value", state)): number for state, number in states.items() if number}


class Load:
    """Clients that send one request after the other, every second one as a stream."""

    def __init__(self, url: str, clients: int) -> None:
        self.wrong: list[str] = []
        self.num_requests = 0
        self._url = url
        self._has_ended = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(number,), daemon=True) for number in range(clients)]

    def _send(self, number: int) -> None:
        while not self._has_ended.is_set():
            number += 1
            body = body_of(40)
            try:
                if number % 2:
                    response = post(self._url, body)
                    if response.status_code != 200:
                        self.wrong.append(response.text)
                else:
                    stream = Stream(self._url, body).start().wait()
                    if stream.finish_reason != "length" or not stream.is_done:
                        self.wrong.append(f"{stream.error} {stream.fault}")
            except Exception as error:
                self.wrong.append(repr(error))
            self.num_requests += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


def test_one_two_one_replicas_without_a_failed_request(app: str) -> None:
    assert states() == {"RUNNING": 1}
    with Load(app, 8) as load:
        wait_until(lambda: states() == {"RUNNING": 2})
        alone = load.num_requests
        wait_until(lambda: load.num_requests >= alone + 30)
    assert not load.wrong
    # Two long streams, one on each replica: one replica drains while its stream goes on.
    streams = []
    for _ in range(2):
        streams.append(Stream(app, body_of(900)).start())
        wait_until(lambda: streams[-1].chunks)
    assert [each["num_requests"] for each in replicas()] == [1, 1]
    with Load(app, 1) as load:
        wait_until(lambda: states() == {"RUNNING": 1, "STOPPING": 1})
        assert all(stream.thread.is_alive() for stream in streams)
        wait_until(lambda: states() == {"RUNNING": 1})
    assert not load.wrong
    assert load.num_requests
    for stream in streams:
        assert stream.wait(60).finish_reason == "length"
        assert stream.fault is None


def counts(url: str) -> dict[str, float]:
    """Requests that each replica has ended."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        if line.startswith("vllm:request_success_total"):
            name = line.split('replica="')[1].split('"')[0]
            found[name] = found.get(name, 0) + float(line.split()[-1])
    return found


def place_of(url: str, body: dict[str, Any], **headers: str) -> str:
    """The replica that serves a request."""
    before = counts(url)
    assert post(url, body, **headers).status_code == 200
    after = counts(url)
    return next(name for name in after if after[name] > before.get(name, 0))


def test_a_conversation_stays_on_its_replica(app: str) -> None:
    deploy("conversation", num_replicas=2)
    wait_until(lambda: len(replicas()) == 2)
    starts = [f"def function_{number}(a, b):\n    return a + {number}\n" * 40 for number in range(8)]
    places = []
    for start in starts:
        turns = {place_of(app, {"prompt": start + "# more\n" * turn, "max_tokens": 4}) for turn in range(3)}
        assert len(turns) == 1
        places += turns
    assert len(set(places)) == 2  # not all on the same
    named = {place_of(app, {"prompt": start, "max_tokens": 4}, **{"X-Session-Id": "7"}) for start in starts}
    assert len(named) == 1


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="the router of ray[llm] needs pyarrow")
def test_rays_prefix_aware_router(app: str) -> None:
    router = {
        "request_router_class": f"{PREFIX_ROUTER}.PrefixCacheAffinityRouter",
        "request_router_kwargs": {"imbalanced_threshold": 4, "do_eviction": True},
    }
    deploy(num_replicas=2, request_router_config=router)
    wait_until(lambda: len(replicas()) == 2)
    starts = [f"class Class{number}:\n    def method_{number}(self): pass\n" * 20 for number in range(6)]
    places = []
    for start in starts:
        turns = {place_of(app, {"prompt": start + "# more\n" * turn, "max_tokens": 4}) for turn in range(3)}
        assert len(turns) == 1
        places += turns
    assert len(set(places)) == 2
    begun = time.monotonic()
    assert httpx.post(f"{app}/tokenize", json={"prompt": "a"}, timeout=30).status_code == 200  # any request has a text
    assert httpx.get(app, timeout=30).status_code == 200
    assert time.monotonic() - begun < 20
