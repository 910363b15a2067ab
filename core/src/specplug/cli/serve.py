"""`specplug serve`: an HTTP server with OpenAI's endpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import Any

import click

from specplug.cli.inputs import read_template
from specplug.cli.options import GroupedCommand, engine_options, lora_options, named, option_group, read_engine_options
from specplug.cli.process import check_plugins
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError

_KEY_VARIABLE = "SPECPLUG_API_KEY"
_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")
_SERVER = (
    "host",
    "port",
    "uds",
    "ssl_certfile",
    "ssl_keyfile",
    "root_path",
    "api_key",
    "allowed_origin",
    "served_model_name",
    "chat_template",
    "allow_runtime_lora_updating",
    "max_queued_requests",
    "max_body_size",
    "request_timeout",
    "drain_timeout",
    "per_request_spec_decode_metrics",
    "playground",
    "access_log",
    "quiet",
)
_address_options = option_group(
    "Address",
    named("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="Name or address to listen on."),
    named("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: a free one."),
    named("--uds", metavar="PATH", help="A Unix domain socket, instead of host and port."),
    named("--ssl-certfile", metavar="FILE", help="Certificate chain for TLS."),
    named("--ssl-keyfile", metavar="FILE", help="Its private key, if it is in another file."),
    named("--root-path", default="", metavar="PATH", help="Path under which a proxy publishes the server."),
)
_access_options = option_group(
    "Access",
    named(
        "--api-key",
        multiple=True,
        metavar="KEY",
        help=f"Require this key. Repeatable; also from {_KEY_VARIABLE}, which other users cannot see.",
    ),
    named(
        "--allowed-origin",
        multiple=True,
        metavar="URL",
        help="Pages of this origin may read responses; *: all. Repeatable. [default: none]",
    ),
    named("--max-body-size", default="16MiB", show_default=True, metavar="SIZE", help="Largest request body."),
)
_request_options = option_group(
    "Request",
    named("--served-model-name", multiple=True, metavar="NAME", help="Name of the model in requests. Repeatable."),
    named("--chat-template", metavar="FILE", help="A Jinja template instead of the tokenizer's."),
    named(
        "--max-queued-requests",
        type=click.IntRange(0),
        default=256,
        show_default=True,
        metavar="N",
        help="Sequences that may wait for a row; above it, requests get 503.",
    ),
    named("--request-timeout", type=float, metavar="SECONDS", help="Abort requests that take longer."),
    named(
        "--drain-timeout",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="Time for running requests to end after SIGTERM.",
    ),
    named(
        "--per-request-spec-decode-metrics",
        type=click.Choice(["none", "summary", "detailed"]),
        default="none",
        show_default=True,
        help="Report speculation in each response.",
    ),
    named(
        "--allow-runtime-lora-updating",
        is_flag=True,
        help="Let requests load and unload adapters from this machine's folders: for callers that are trusted.",
    ),
    named("--playground/--no-playground", default=True, show_default=True, help="Serve the playground at /."),
    named("--access-log", is_flag=True, help="Log each request on standard error."),
    named("-q", "--quiet", is_flag=True, help="Hide startup steps."),
)
_strict = option_group(
    "Speculation",
    named("--strict", is_flag=True, help="Stop when a speculator fails, instead of continuing without its drafts."),
)


@click.command(cls=GroupedCommand, short_help="Serve a model over HTTP.")
@click.argument("target")
@_address_options
@_access_options
@_request_options
@engine_options
@lora_options
@_strict
def serve(target: str, **given: Any) -> None:
    """Serve TARGET over HTTP, with the endpoints of OpenAI: a folder, a hub name, or tiny, the model that comes with specplug.

    Needs: pip install 'specplug[serve]'. Ctrl-C or SIGTERM ends the server once the running requests have ended.

    \b
    Example:
      specplug serve tiny --speculative-config '{"method": "ngram"}'
      curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "import os", "max_tokens": 32, "temperature": 0}'
    """  # noqa: D301
    _check_extra()
    from specplug.config.engine import EngineConfig, parse_bytes

    server = {name: given.pop(name) for name in _SERVER}
    engine = read_engine_options(given)
    config = EngineConfig.create(target, **engine)
    keys = [*server["api_key"], *filter(None, [os.environ.get(_KEY_VARIABLE)])]
    if any(not key.strip() or not key.isascii() for key in keys):
        raise ConfigurationError("--api-key: a key is empty or has characters that are not ASCII")
    if server["request_timeout"] is not None and not server["request_timeout"] > 0:
        raise ConfigurationError(f"--request-timeout {server['request_timeout']:g}: expected a positive number")
    root_path = server["root_path"].rstrip("/")
    if root_path and not root_path.startswith("/"):
        raise ConfigurationError(f"--root-path {server['root_path']}: expected a path that begins with '/'")
    try:
        max_body_bytes = parse_bytes(server["max_body_size"])
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("memory=", "--max-body-size ", 1)) from error
    template = server["chat_template"]
    names = server["served_model_name"] or (target,)
    if taken := next((module.lora_name for module in config.lora_modules if module.lora_name in names), None):
        raise ConfigurationError(
            f"--lora-modules: the adapter '{taken}' has the name of the model; give it another one"
        )
    if server["allow_runtime_lora_updating"]:
        engine["enable_lora"] = True

    from specplug.server.settings import ServerSettings

    settings = ServerSettings(
        model_names=names,
        api_keys=tuple(keys),
        allowed_origins=server["allowed_origin"],
        root_path=root_path,
        chat_template=None if template is None else read_template(template),
        max_body_bytes=max_body_bytes,
        request_timeout=server["request_timeout"],
        speculative_metrics=server["per_request_spec_decode_metrics"],
        playground=server["playground"],
        updates_adapters=server["allow_runtime_lora_updating"],
    )
    endpoint = {
        "host": server["host"],
        "port": server["port"],
        "uds": server["uds"],
        "ssl_certfile": server["ssl_certfile"],
        "ssl_keyfile": server["ssl_keyfile"],
        "access_log": server["access_log"],
        "drain_timeout": server["drain_timeout"],
    }
    from specplug.cli.run.serve import ServeJob, run_job

    job = ServeJob(target, engine, settings, endpoint, server["max_queued_requests"], quiet=server["quiet"])
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print
        check_plugins(config)
        run_job(job, Terminal.err())


def _check_extra() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"specplug serve needs {', '.join(missing)}, not installed here: pip install 'specplug[serve]'"
        )
