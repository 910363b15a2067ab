"""`vllm serve` with the arguments that `specplug vllm-config` prints: OpenAI's protocol, and the counters in /metrics."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from specplug import resolve_model

pytestmark = pytest.mark.slow
PATIENCE = 240.0


def fetch(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("option", ["--adapter", "--worker"])
def test_server(tmp_path: Path, option: str) -> None:
    bin_folder = Path(sys.executable).parent
    config = ["vllm-config", '{"method": "suffix", "num_speculative_tokens": 4}', option]
    printed = subprocess.run([bin_folder / "specplug", *config], capture_output=True, text=True, check=True).stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model("tiny"))),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
        *("--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"),
        *shlex.split(printed),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                fetch(f"{url}/health")
                break
            except OSError:
                time.sleep(1)
        body = {"model": "tiny", "prompt": "x = [0, 1, 0, 1,", "max_tokens": 40, "temperature": 0}
        first = json.loads(fetch(f"{url}/v1/completions", body))["choices"][0]["text"]
        again = json.loads(fetch(f"{url}/v1/completions", body))["choices"][0]["text"]
        assert first == again != ""
        metrics = fetch(f"{url}/metrics")
        found = {
            line.split("{")[0]: float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("specplug:") and 'method="suffix"' in line and "_created" not in line
        }
        assert found["specplug:spec_decode_num_draft_tokens_total"] > 0
        assert found["specplug:spec_decode_num_accepted_tokens_total"] > 0
        assert found["specplug:spec_decode_propose_seconds_total"] > 0
        assert found["specplug:speculator_faults_total"] == 0
        assert found["specplug:speculator_enabled"] == 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
