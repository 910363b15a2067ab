"""The settings of a server."""

from __future__ import annotations

from typing import Literal

import attrs

SpeculativeMetrics = Literal["none", "summary", "detailed"]
DEFAULT_MAX_BODY_BYTES = 16 * 1024**2
DEFAULT_MAX_QUEUED_REQUESTS = 256
DEFAULT_DRAIN_SECONDS = 30.0


@attrs.frozen(kw_only=True)
class ServerSettings:
    """How requests are served. Seconds everywhere.

    Attributes:
        model_names: the names that requests may use; the first one is in the responses.
        api_keys: keys of which a request must give one; empty lets everybody in.
        allowed_origins: origins whose pages may read responses; `*` for all.
        root_path: the path prefix under which a proxy publishes the server.
        chat_template: a Jinja template instead of the tokenizer's.
        max_body_bytes: larger request bodies are refused.
        body_timeout: until the whole body of a request has arrived.
        send_timeout: until a client that does not read its response is given up.
        request_timeout: until a request is aborted; None lets it run.
        speculative_metrics: what responses say about speculation, as `metrics.speculative_decoding`.
        retry_after: what refused clients are told to wait.
        playground: whether the playground is served at `/`.
        updates_adapters: whether requests may load and unload LoRA adapters.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    chat_template: str | None = None
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    request_timeout: float | None = None
    speculative_metrics: SpeculativeMetrics = "none"
    retry_after: int = 1
    playground: bool = True
    updates_adapters: bool = False
