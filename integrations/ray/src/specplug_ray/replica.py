"""A replica: an engine with the application that `specplug serve` serves, called by the ingress."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve

from specplug.async_llm import AsyncLLM
from specplug.server.app import create_app
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState
from specplug_ray.messages import Forwarded, Head, respond

logger = logging.getLogger("ray.serve")  # the logger that Ray documents for deployments
_FLUSH_SECONDS = 0.5  # for Ray to deliver the last parts of responses


class EngineReplica:
    """The class of a model's deployment. Its methods are called through Ray.

    Args:
        model: see `AsyncLLM`.
        engine: keywords of `AsyncLLM`.
        settings: of the server.
    """

    def __init__(self, model: str, engine: Mapping[str, Any], settings: ServerSettings) -> None:
        self._state = ServerState(settings)
        self._llm = AsyncLLM(model, observers=[self._state.metrics.observer], **engine)
        self._state.set_engine(self._llm)
        self._app = create_app(self._state)
        self._num_calls = 0
        self._is_leaving = False

    async def forward(self, request: Forwarded) -> AsyncGenerator[Head | bytes | None, None]:
        """Serves a request.

        Yields:
            None as soon as this replica has the request, then what `respond` yields.

        Raises:
            EngineDeadError: the engine has stopped after an error, and nothing was done.
        """
        self._num_calls += 1
        try:
            self._llm.check_health()
            yield None
            async for part in respond(self._app, request):
                yield part
        finally:
            self._num_calls -= 1
            if self._llm.errored and not self._num_calls:
                self._leave()

    def check_health(self) -> None:
        """Raises if the engine has stopped; Ray then replaces the replica.

        Raises:
            EngineDeadError: it has.
        """
        self._llm.check_health()

    async def describe(self) -> dict[str, Any]:
        """What the ingress says of a model, and where this replica is."""
        return {
            "replica": serve.get_replica_context().replica_tag,
            "pid": os.getpid(),
            "created": self._state.created,
            "max_model_len": self._llm.engine.plan.max_model_len,
            "num_requests": self._state.num_requests,
        }

    async def metrics(self) -> tuple[str, bytes]:
        """Its name, and its metrics in Prometheus's text format."""
        return serve.get_replica_context().replica_tag, self._state.metrics.exposition()

    async def abort(self, request_id: str) -> bool:
        """Ends a request, if it is here."""
        return self._state.abort(request_id)

    def _leave(self) -> None:
        """Ends the process. Ray drops a dead replica at once, but would send requests to an unhealthy one for three checks."""
        if not self._is_leaving:
            self._is_leaving = True
            logger.error("the engine has stopped after an error; this replica ends and Ray starts another one")
            timer = threading.Timer(_FLUSH_SECONDS, os._exit, (1,))
            timer.daemon = True
            timer.start()

    def __del__(self) -> None:
        """Frees the engine; Ray calls it after the last request."""
        llm = getattr(self, "_llm", None)
        if llm is not None:
            llm.close()
