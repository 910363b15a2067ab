"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from specplug.async_llm import AsyncLLM
from specplug.server.errors import ApiError
from specplug.server.metrics import ServerMetrics
from specplug.server.settings import ServerSettings


class ServerState:
    """The engine of a server, once it runs, and the requests in work.

    Args:
        settings: the server's.
        engine: the engine; None while it starts.
        metrics: the server's own; the engine reports to `metrics.observer`.

    Attributes:
        is_draining: whether the server is about to end and takes no more requests.
        created: when the server started, in seconds of the epoch.
        num_requests: how many requests for completions are in work.
        loading: held while an adapter is loaded.
    """

    def __init__(
        self, settings: ServerSettings, engine: AsyncLLM | None = None, metrics: ServerMetrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics or ServerMetrics(settings.model_names[0])
        self.is_draining = False
        self.created = int(time.time())
        self.num_requests = 0
        self.loading = asyncio.Lock()
        self._engine: AsyncLLM | None = None
        self._defaults: dict[str, Any] = {}
        self._in_work: dict[str, list[str]] = {}
        if engine is not None:
            self.set_engine(engine)

    def set_engine(self, engine: AsyncLLM) -> None:
        """Makes the server ready."""
        from specplug.sampling.defaults import recommended_options
        from specplug.tiny import resolve_model

        self._defaults = recommended_options(resolve_model(engine.config.model), engine.config.revision)
        self._defaults.pop("max_tokens", None)
        self.metrics.watch(engine.engine)
        self._engine = engine

    @property
    def engine(self) -> AsyncLLM:
        """The engine.

        Raises:
            ApiError: it does not serve requests, now or any more.
        """
        if self._engine is None:
            raise ApiError(503, "the model is being loaded", code="starting", retry_after=self.settings.retry_after)
        return self._engine

    @property
    def ready_engine(self) -> AsyncLLM:
        """The engine, if the server takes new requests.

        Raises:
            ApiError: it does not, or not now.
        """
        engine = self.engine
        if self.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="shutting_down", retry_after=self.settings.retry_after
            )
        return engine

    @property
    def default_options(self) -> Mapping[str, Any]:
        """The sampling parameters that the model's generation_config recommends."""
        return self._defaults

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use: the model's own, then those of the loaded adapters."""
        adapters = () if self._engine is None else self._engine.lora_requests
        return (*self.settings.model_names, *(each.lora_name for each in adapters))

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; None if it is the model's own."""
        return None if model is None or model in self.settings.model_names else model

    def check_model(self, name: str | None) -> str:
        """The name of the model for a response: one of its own, or a loaded adapter's.

        Raises:
            ApiError: there is no such model.
        """
        names = self.model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"there is no model {name!r} here; served: {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    @contextmanager
    def in_work(self, prefix: str, given: str | None, count: int) -> Iterator[tuple[str, list[str]]]:
        """Names a request while it is in work.

        Args:
            prefix: of its `id`.
            given: the caller's name for it.
            count: its prompts.

        Yields:
            Its `id`, and the engine's name for each prompt.

        Raises:
            ApiError: the name is in use.
        """
        request_id = f"{prefix}-{given or uuid.uuid4().hex}"
        if request_id in self._in_work:
            raise ApiError(409, f"request_id {given!r} is already in use", param="request_id", code="duplicate")
        names = [f"{request_id}-{index}" for index in range(count)]
        self._in_work[request_id] = names
        self.num_requests += 1
        try:
            yield request_id, names
        finally:
            self.num_requests -= 1
            del self._in_work[request_id]

    def abort(self, request_id: str) -> bool:
        """Ends a request, by its `id` or by the caller's name; returns whether it was unfinished."""
        wanted = {request_id, f"cmpl-{request_id}", f"chatcmpl-{request_id}", f"trace-{request_id}"}
        names = [name for each in wanted for name in self._in_work.get(each, ())]
        return sum(self.engine.abort(name) for name in names) > 0
