"""The endpoints that are about all replicas: the ingress asks each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from ray.serve.handle import DeploymentHandle

from specplug.server.errors import ApiError
from specplug.server.protocol.tokens import AbortBody
from specplug.version import __version__
from specplug_ray.exposition import merge
from specplug_ray.options import ModelOptions

_SECONDS = 10.0  # for a replica to reply
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
Served = Sequence[tuple[ModelOptions, DeploymentHandle]]


def add_status(app: FastAPI, served: Served) -> None:
    """Adds the endpoints to the ingress's application."""
    started = int(time.time())

    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> dict[str, Any]:
        """Say how many replicas of each model reply: 503 if there is none at all."""
        counts = {model.names[0]: len(await ask(handle, "describe")) for model, handle in served}
        if not any(counts.values()):
            raise ApiError(503, "no replica replies", code="no_replica")
        return {"status": "ok", "replicas": counts}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Say the server's version."""
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Count the requests for completions in work, in all replicas."""
        replies = [reply for _, handle in served for reply in await ask(handle, "describe")]
        return {"server_load": sum(reply["num_requests"] for reply in replies)}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics of all replicas, told apart by the label `replica`."""
        texts = [text for _, handle in served for text in await ask(handle, "metrics")]
        return Response(merge(texts), media_type=_EXPOSITION)

    @app.post("/abort")
    async def abort(body: AbortBody) -> dict[str, Any]:
        """End a request that is in work in any replica."""
        replies = [reply for _, handle in served for reply in await ask(handle, "abort", body.request_id)]
        return {"aborted": any(replies)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the names under which models are served."""
        return {"object": "list", "data": [card for each in served for card in await _cards(*each, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one of these names."""
        for each in served:
            if name in each[0].served:
                return next(card for card in await _cards(*each, started) if card["id"] == name)
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")


async def ask(handle: DeploymentHandle, method: str, *arguments: Any) -> list[Any]:
    """The replies of all replicas that reply."""
    try:
        replies = await asyncio.wait_for(
            handle.broadcast(method, *arguments).results_async(return_exceptions=True), _SECONDS
        )
    except TimeoutError:
        return []
    return [reply for reply in replies if not isinstance(reply, BaseException)]


async def _cards(model: ModelOptions, handle: DeploymentHandle, started: int) -> list[dict[str, Any]]:
    """The entries of one model. Its length is unknown while it has no replica."""
    replies = await ask(handle, "describe")
    known = {"max_model_len": replies[0]["max_model_len"]} if replies else {}
    return [
        {
            "id": name,
            "object": "model",
            "created": min((reply["created"] for reply in replies), default=started),
            "owned_by": "specplug",
            "root": model.adapters.get(name, model.model),
            "parent": model.names[0] if name in model.adapters else None,
            **known,
        }
        for name in model.served
    ]
