"""A Ray cluster of this machine, for the tests that have `ray`. CONTRIBUTING.md says how to run them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.environment import ROOT

SOURCE = ROOT / "integrations/ray/src"
sys.path.insert(0, str(SOURCE))
STORE_BYTES = 100 * 2**20


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Ray's HTTP proxy."""
    ray = pytest.importorskip("ray")
    from ray import serve

    paths = [str(SOURCE), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ray.init(
        address="local",  # never a cluster that is running already
        num_cpus=4,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where the target is."""
    from specplug import resolve_model

    return Path(resolve_model("tiny"))
