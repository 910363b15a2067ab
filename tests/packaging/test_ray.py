"""specplug-ray from its wheel beside core's, outside the checkout. CONTRIBUTING.md says how to run it."""

from __future__ import annotations

import importlib.util

import pytest

from support.environment import ROOT, Environment, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]
LISTING = """
import sys
from importlib.metadata import entry_points
import specplug, specplug_ray
(point,) = entry_points(group="specplug.integrations")
assert point.name == "ray" and point.load() is specplug_ray
assert "ray" not in sys.modules
print(point.dist.name, point.dist.version)
"""
SERVING = """
import socket
import httpx, ray
from ray import serve
from specplug_ray import build_openai_app

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
small = {"ray_actor_options": {"num_cpus": 0.5}}
engine = {"memory": "256MiB", "compile": False, "dtype": "float32"}
serve.run(build_openai_app({"model": "tiny", "engine": engine, "deployment": small, "ingress": small}))
body = {"prompt": "def add(a, b):", "max_tokens": 16, "temperature": 0}
response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).raise_for_status()
print("TEXT", repr(response.json()["choices"][0]["text"]))
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("ray"))
    for project in ("core", "integrations/ray"):
        made.pip("install", "--quiet", "--no-deps", str(build(ROOT / project)))
    return made


def test_it_is_an_integration_and_imports_ray_late(environment: Environment) -> None:
    done = environment.run("python", "-c", LISTING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["specplug-ray", "0.1.0"]
    assert environment.methods() == set()  # it is no speculator


def test_it_serves(environment: Environment) -> None:
    from specplug import LLM, SamplingParams

    done = environment.run("python", "-c", SERVING)
    assert done.returncode == 0, done.stdout + done.stderr
    with LLM("tiny", memory="256MiB", compile=False, dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=16)
        text = llm.generate("def add(a, b):", params)[0].outputs[0].text
    assert f"TEXT {text!r}" in done.stdout
