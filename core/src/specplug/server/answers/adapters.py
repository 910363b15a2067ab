"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

import itertools

from starlette.responses import PlainTextResponse, Response

from specplug.errors import SpecplugError
from specplug.lora.request import LoRARequest
from specplug.server.errors import ApiError, api_error
from specplug.server.protocol.adapters import LoadAdapterBody, UnloadAdapterBody
from specplug.server.state import ServerState


async def load_adapter(state: ServerState, body: LoadAdapterBody) -> Response:
    """Loads an adapter, under the next free number.

    Raises:
        ApiError: the name is in use, the adapter cannot be loaded, or there is no room.
    """
    engine = state.ready_engine
    async with state.loading:  # two that are loaded at once would get the same number
        if body.lora_name in state.model_names:
            raise ApiError(400, f"there is a model '{body.lora_name}' already; unload it first", param="lora_name")
        taken = engine.list_loras()
        number = next(number for number in itertools.count(1) if number not in taken)
        try:
            await engine.add_lora(LoRARequest(body.lora_name, number, body.lora_path))
        except SpecplugError as error:
            raise api_error(error, state.settings.retry_after) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(state: ServerState, body: UnloadAdapterBody) -> Response:
    """Unloads an adapter; requests that use it run on with it.

    Raises:
        ApiError: there is no such adapter.
    """
    engine = state.ready_engine
    number = next((each.lora_int_id for each in engine.lora_requests if each.lora_name == body.lora_name), None)
    if number is None or not await engine.remove_lora(number):
        raise ApiError(404, f"no adapter '{body.lora_name}' is loaded", param="lora_name", code="model_not_found")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
