"""The bodies of requests that load and unload LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from specplug.server.protocol.base import Body

Name = Annotated[str, Field(min_length=1)]


class LoadAdapterBody(Body):
    """The body of POST /v1/load_lora_adapter.

    Attributes:
        lora_name: the name that requests give as their model.
        lora_path: the adapter's folder on the server, or its name on the hub.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"load_inplace": (False,)}

    lora_name: Name
    lora_path: Name


class UnloadAdapterBody(Body):
    """The body of POST /v1/unload_lora_adapter.

    Attributes:
        lora_name: the adapter's name.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lora_int_id": ()}

    lora_name: Name
