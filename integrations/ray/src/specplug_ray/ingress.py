"""The ingress: takes HTTP requests, and forwards each to a replica of its model."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

import attrs
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from specplug.errors import EngineDeadError
from specplug.server.app import guard
from specplug.server.errors import ApiError, install_handlers
from specplug_ray.messages import Forwarded, Head, conversation_of, forwarded
from specplug_ray.options import AppOptions, ModelOptions
from specplug_ray.status import add_status

logger = logging.getLogger("ray.serve")
_ATTEMPTS = 4  # replicas that a request is given to, if they end before they respond
_PAUSE_SECONDS = 0.2  # after the first; all together are longer than a replica with a dead engine stays
_KEY_VARIABLE = "SPECPLUG_API_KEY"
_SESSION_HEADER = "x-session-id"
_EVENTS = "text/event-stream"
_LINES = "application/jsonl"


class Ingress:
    """The class of the ingress's deployment.

    Args:
        options: of the application.
        handles: of the models' deployments, in the order of `options.models`.
    """

    def __init__(self, options: AppOptions, *handles: DeploymentHandle) -> None:
        self._options = options
        self._handles = handles

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that `serve.ingress` documents
        """Makes the application that Ray serves."""
        settings = self._options.settings
        key = os.environ.get(_KEY_VARIABLE)
        if key:
            settings = attrs.evolve(settings, api_keys=(*settings.api_keys, key))
        app = FastAPI(title="specplug", docs_url=None, redoc_url=None, openapi_url=None)
        install_handlers(app)
        add_status(app, list(zip(self._options.models, self._handles, strict=True)))

        @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST"])
        async def forward(request: Request) -> Response:
            return await self._forward(request)

        guard(app, settings)
        return app

    async def _forward(self, request: Request) -> Response:
        body = await request.body()
        fields = _fields(body)
        model, handle = self._choose(fields)
        conversation = conversation_of(fields, request.headers.get(_SESSION_HEADER))
        options = handle.options(method_name="forward", stream=True, session_id=conversation)
        parts, head = await self._begin(options, forwarded(request.scope, body, fields), model)
        kind = next((value.decode("latin-1") for name, value in head.headers if name == b"content-type"), "")
        response = StreamingResponse(_relay(parts, kind), status_code=head.status)
        response.raw_headers = head.headers
        return response

    def _choose(self, fields: Any) -> tuple[ModelOptions, DeploymentHandle]:
        models = self._options.models
        name = fields.get("model") if isinstance(fields, dict) else None
        if not isinstance(name, str):  # a replica says what is wrong with it, if something is
            return models[0], self._handles[0]
        for model, handle in zip(models, self._handles, strict=True):
            if name in model.served:
                return model, handle
        served = ", ".join(self._options.settings.model_names)
        raise ApiError(404, f"there is no model {name!r} here; served: {served}", param="model", code="model_not_found")

    async def _begin(
        self, handle: DeploymentHandle, request: Forwarded, model: ModelOptions
    ) -> tuple[DeploymentResponseGenerator, Head]:
        """Gives a request to a replica, and to another one if that ends before it responds."""
        retry_after = self._options.settings.retry_after
        for attempt in range(1, _ATTEMPTS + 1):
            parts = handle.remote(request)
            try:
                await asyncio.wait_for(anext(parts), self._options.replica_timeout)  # a replica has it
                return parts, await anext(parts)
            except TimeoutError as error:
                parts.cancel()
                message = f"no replica of {model.names[0]} took the request within {self._options.replica_timeout:g} s"
                raise ApiError(503, message, code="no_replica", retry_after=retry_after) from error
            except BackPressureError as error:
                message = f"{error.message} Try again later."
                raise ApiError(503, message, code="queue_full", retry_after=retry_after) from error
            except DeploymentUnavailableError as error:
                raise ApiError(503, error.message, code="no_replica", retry_after=retry_after) from error
            except (RayError, EngineDeadError) as error:
                logger.warning("a replica of %s ended before it responded: %s", model.names[0], error)
                if attempt == _ATTEMPTS:
                    raise _ended(error, retry_after) from error
                await asyncio.sleep(_PAUSE_SECONDS * attempt)
            except BaseException:  # the client has left
                parts.cancel()
                raise
        raise AssertionError


async def _relay(parts: DeploymentResponseGenerator, kind: str) -> AsyncGenerator[bytes, None]:
    """The body of a response. A stream whose replica ends is ended by an error, in the form of its other events."""
    try:
        async for part in parts:
            yield part
    except RayError as error:
        logger.warning("a replica ended during a response: %s", error)
        reason = _ended(error, 0)
        if kind.startswith(_EVENTS):
            yield reason.event
            yield b"data: [DONE]\n\n"
        elif kind.startswith(_LINES):
            yield json.dumps({"event": "error", **reason.body}).encode() + b"\n"
        else:
            raise
    finally:
        parts.cancel()


def _ended(error: BaseException, retry_after: int) -> ApiError:
    message = "the replica that served this request ended before the response was complete; send the request again"
    return ApiError(503, f"{message} ({type(error).__name__})", code="replica_ended", retry_after=retry_after)


def _fields(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return None  # a replica says what is wrong with it
