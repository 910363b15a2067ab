"""Runs the server of `specplug serve`."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.process import import_libraries
from specplug.cli.views.startup import StartupView

if TYPE_CHECKING:
    from specplug.async_llm import AsyncLLM
    from specplug.cli.terminal import Terminal
    from specplug.server.settings import ServerSettings


@attrs.frozen
class ServeJob:
    """The input of `specplug serve`.

    Attributes:
        target: the model.
        engine: keywords of `AsyncLLM`.
        settings: of the server.
        endpoint: keywords of `Endpoint`.
        max_queued_requests: sequences that may wait for a row.
        quiet: hide startup steps.
    """

    target: str
    engine: dict[str, Any]
    settings: ServerSettings
    endpoint: dict[str, Any]
    max_queued_requests: int
    quiet: bool


def run_job(job: ServeJob, err: Terminal) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        job: the input.
        err: receives startup steps and messages.

    Raises:
        SpecplugError: the address cannot be used, or the engine does not start.
    """
    from specplug.server.process import Endpoint

    endpoint = Endpoint(**job.endpoint)
    endpoint.check_tls()
    listener = endpoint.bind()
    with listener, StartupView(err, quiet=job.quiet) as view:
        view.announce("importing PyTorch and Transformers")
        import_libraries()
        from specplug.async_llm import AsyncLLM
        from specplug.server.app import create_app
        from specplug.server.process import run_server
        from specplug.server.state import ServerState

        if endpoint.access_log:
            _log_requests()
        state = ServerState(job.settings)

        def load() -> AsyncLLM:
            return AsyncLLM(
                job.target,
                on_step=view,
                max_queued_requests=job.max_queued_requests,
                observers=[state.metrics.observer],
                **job.engine,
            )

        def on_ready() -> None:
            err.line(f"Serving {', '.join(job.settings.model_names)} at {endpoint.url(listener)}; Ctrl-C ends it.")
            if not endpoint.is_local and not job.settings.api_keys:
                logging.getLogger("specplug").warning(
                    "everybody who can reach %s may use this server: give --api-key, or set SPECPLUG_API_KEY",
                    endpoint.url(listener),
                )

        def on_drain(number: int) -> None:
            if number:
                err.line(f"Waiting up to {endpoint.drain_timeout:g} s for {number} sequences; Ctrl-C aborts them.")

        asyncio.run(run_server(create_app(state), state, endpoint, listener, load, on_ready, on_drain))


def _log_requests() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
