"""Errors as HTTP responses, with OpenAI's error object."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from specplug.engine.engine import CLOSED
from specplug.errors import DeadlineExceededError, EngineDeadError, GenerationError, QueueFullError, SpecplugError

logger = logging.getLogger("specplug")
_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 504: "timeout_error"}
_PARAMETER = re.compile(r"^(?:prompts\[\d+\]: )?(?:sampling parameter )?([a-z][a-z_]*)(?:=| names )")

_QUOTED = re.compile(r"^'(\w+)' ")


class ApiError(Exception):
    """A request that gets an error.

    Args:
        status: the HTTP status.
        message: what is wrong, and how to mend it.
        param: the field that it is about.
        code: OpenAI's name for it, if there is one.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)

    @property
    def event(self) -> bytes:
        """A server-sent event, for streams that have begun."""
        return b"data: " + json.dumps(self.body, ensure_ascii=False).encode() + b"\n\n"


def api_error(error: SpecplugError, retry_after: int = 1) -> ApiError:
    """Converts what the engine raises."""
    message = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(503, message, code="queue_full", retry_after=retry_after)
    if isinstance(error, EngineDeadError) or message in (CLOSED, "the engine is closed"):
        return ApiError(503, message, code="engine_stopped")
    if isinstance(error, DeadlineExceededError):
        return ApiError(504, message, code="timeout")
    if isinstance(error, GenerationError):
        return ApiError(500, message, code="generation_failed")
    named = _PARAMETER.match(message)
    return ApiError(400, message, param=named[1] if named else None)


def install_handlers(app: FastAPI) -> None:
    """Makes every error of an application one with OpenAI's error object."""

    @app.exception_handler(ApiError)
    async def _known(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(SpecplugError)
    async def _engine(request: Request, error: SpecplugError) -> JSONResponse:
        return api_error(error).response

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_error(error).response

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, f"internal error: {type(error).__name__}").response


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields; how many others there are."""
    errors = error.errors()
    # A name that is mistyped is also missing: the one that was sent says more.
    first = errors[0]
    if first["type"] == "missing":
        first = next((each for each in errors if each["type"] == "extra_forbidden"), first)
    path = ".".join(map(str, first["loc"][1:]))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason} (at character {path})", code="invalid_json")
    message = first["msg"]
    if first["type"] == "none_required":
        return ApiError(400, f"'{path}' is not supported yet; leave it out", param=path)
    if first["type"] == "extra_forbidden":
        message = "unknown field; it is neither OpenAI's nor an extension that specplug serves"
    elif first["type"] in ("missing", "model_attributes_type", "dict_type") and not path:
        message = "expected a JSON object"
    more = len({str(each["loc"]) for each in errors}) - 1
    others = f" (and {more} more)" if more else ""
    named = _QUOTED.match(message)  # errors about several fields begin with the one to change
    if named is not None:
        path = ".".join(filter(None, (path, named[1])))
        return ApiError(400, message + others, param=path)
    return ApiError(400, f"{path or 'the body'}: {message}{others}", param=path or None)
