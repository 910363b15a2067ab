"""The application: its endpoints and what stands before them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from specplug.errors import SpecplugError
from specplug.server.answers.adapters import load_adapter, unload_adapter
from specplug.server.answers.chat import create_chat_completion
from specplug.server.answers.completions import create_completion
from specplug.server.answers.tokenization import detokenize, tokenize
from specplug.server.answers.trace import create_trace, describe
from specplug.server.errors import ApiError, install_handlers
from specplug.server.middleware import OPEN_PATHS, Authentication, BodyLimits, ResponseCounter
from specplug.server.pages import PAGE_PATHS, add_pages
from specplug.server.protocol.adapters import LoadAdapterBody, UnloadAdapterBody
from specplug.server.protocol.chat import ChatBody
from specplug.server.protocol.completions import CompletionBody
from specplug.server.protocol.tokens import AbortBody, DetokenizeBody, TokenizeBody
from specplug.server.protocol.trace import TraceBody
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState
from specplug.server.streaming import ClientGoneError
from specplug.version import __version__

_CLIENT_GONE = 499  # nginx's number; nobody reads it
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


def create_app(state: ServerState) -> FastAPI:
    """Makes the application of a server. More routes can be added to it; they are guarded like these.

    Args:
        state: settings, engine and metrics. `state.set_engine` makes the application ready, also later.
    """
    app = FastAPI(title="specplug", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = state
    install_handlers(app)
    _add_generation(app, state)
    _add_tokens(app, state)
    _add_status(app, state)
    _add_trace(app, state)
    if state.settings.updates_adapters:
        _add_adapters(app, state)
    if state.settings.playground:
        add_pages(app)
    guard(app, state.settings)
    app.add_middleware(ResponseCounter, metrics=state.metrics)
    return app


def guard(app: FastAPI, settings: ServerSettings) -> None:
    """Makes every request of an application pass the API key, the limits of its body, and the allowed origins.

    Args:
        app: an application; `create_app` has done this for its own.
        settings: the server's.
    """
    open_paths = OPEN_PATHS | PAGE_PATHS if settings.playground else OPEN_PATHS
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Authentication, keys=settings.api_keys, open_paths=open_paths)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )


def _add_generation(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a text. With `stream`, the response is a stream of server-sent events."""
        return await create_completion(state, body, request)

    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Reply to a conversation. With `stream`, the response is a stream of server-sent events."""
        return await create_chat_completion(state, body, request)

    @app.post("/abort")
    async def abort(body: AbortBody) -> dict[str, Any]:
        """End a request that is in work; its response ends with the `finish_reason` `abort`."""
        return {"aborted": state.abort(body.request_id)}

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=_CLIENT_GONE)


def _add_tokens(app: FastAPI, state: ServerState) -> None:
    @app.post("/tokenize")
    async def tokens_of_text(body: TokenizeBody) -> dict[str, Any]:
        """Turn a text or a conversation into token ids."""
        return await tokenize(state, body)

    @app.post("/detokenize")
    async def text_of_tokens(body: DetokenizeBody) -> dict[str, Any]:
        """Turn token ids into a text."""
        return await detokenize(state, body)


def _add_trace(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/specplug/trace", response_class=JSONResponse)
    async def trace(body: TraceBody, request: Request) -> Response:
        """Continue a text or reply to a conversation, and tell what every step did. Always a stream."""
        return await create_trace(state, body, request)

    @app.get("/v1/specplug/info")
    async def info() -> dict[str, Any]:
        """Say what the playground must know: the model, its speculators, whether it has a chat template."""
        return describe(state)


def _add_adapters(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterBody) -> Response:
        """Load a LoRA adapter; its name is the name of a model then."""
        return await load_adapter(state, body)

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> Response:
        """Unload a LoRA adapter; requests that use it run on."""
        return await unload_adapter(state, body)


def _add_status(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the names under which the model is served, and the loaded adapters."""
        return {"object": "list", "data": [_model(state, name) for name in state.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one of these names."""
        return _model(state, state.check_model(name))

    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    async def health() -> dict[str, str]:
        """Say whether requests are served: 503 while the model is loaded, while shutting down, and after a fatal error."""
        try:
            state.ready_engine.check_health()
        except SpecplugError as error:
            raise ApiError(503, str(error), code="engine_stopped") from error
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Say the server's version."""
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Count the requests for completions in work."""
        return {"server_load": state.num_requests}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(state.metrics.exposition(), media_type=_EXPOSITION)


def _model(state: ServerState, name: str) -> dict[str, Any]:
    engine = state.engine
    folders = {each.lora_name: each.lora_path for each in engine.lora_requests}
    adapter = state.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "specplug",
        "root": engine.config.model if adapter is None else folders.get(adapter),
        "parent": None if adapter is None else state.settings.model_names[0],
        "max_model_len": engine.engine.plan.max_model_len,
    }
