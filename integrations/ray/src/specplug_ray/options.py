"""What `build_openai_app` is given, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

from specplug.config.engine import EngineConfig
from specplug.errors import ConfigurationError
from specplug.server.settings import DEFAULT_MAX_QUEUED_REQUESTS, ServerSettings

Routing = Literal["load", "conversation", "prefix"]
DEFAULT_DRAIN_SECONDS = 300.0
DEFAULT_REPLICA_SECONDS = 600.0
_ROUTINGS: tuple[str, ...] = get_args(Routing)
_OF_ENGINE_CALL = ("max_queued_requests",)  # an argument of AsyncLLM, not of its configuration
# Settings of a server that this module decides; an adapter that is loaded by a request would be in one replica alone.
_OF_RAY = ("model_names", "root_path", "updates_adapters")
_ROUTERS = {
    "conversation": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "prefix": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
}


@attrs.frozen(kw_only=True)
class ModelOptions:
    """One model.

    Attributes:
        model: a folder, a hub name, or `tiny`; every node of the cluster must find it.
        names: its names in requests.
        adapters: the names of its LoRA adapters and their folders.
        engine: keywords of `AsyncLLM`.
        settings: of the server in each replica.
        deployment: options of Ray's deployment.
    """

    model: str
    names: tuple[str, ...]
    engine: Mapping[str, Any]
    settings: ServerSettings
    deployment: Mapping[str, Any]
    adapters: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def served(self) -> tuple[str, ...]:
        """All names in requests that mean it: with an adapter's, that is used."""
        return (*self.names, *self.adapters)

    @property
    def deployment_name(self) -> str:
        """The name of its deployment; Ray makes file names of it."""
        return "specplug-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in self.names[0])


@attrs.frozen(kw_only=True)
class AppOptions:
    """One application.

    Attributes:
        models: at least one.
        settings: of the server in the ingress.
        ingress: options of the ingress's deployment.
        replica_timeout: seconds that a request waits for a replica that takes it.
    """

    models: tuple[ModelOptions, ...]
    settings: ServerSettings
    ingress: Mapping[str, Any]
    replica_timeout: float


def read_options(args: Mapping[str, Any]) -> AppOptions:
    """Checks what a user wrote.

    Raises:
        ConfigurationError: see `build_openai_app`.
    """
    given = dict(_mapping(args, "args"))
    server = _mapping(given.pop("server", {}), "server")
    ingress = _mapping(given.pop("ingress", {}), "ingress")
    timeout = _seconds(given.pop("replica_timeout", DEFAULT_REPLICA_SECONDS), "replica_timeout")
    if "model" in given:
        models = [given]
        if "models" in given:
            raise ConfigurationError("model and models were given; write one model's keys, or a list of models")
    else:
        models = given.pop("models", None)
        if not isinstance(models, Sequence) or isinstance(models, str) or not models:
            raise ConfigurationError("expected 'model', the target, or 'models', a list of mappings with 'model'")
        _refuse(given, "args", "model, models, server, ingress, replica_timeout")
    read = tuple(
        _read_model(each, server, "" if models == [given] else f"models[{number}].")
        for number, each in enumerate(models)
    )
    _check_distinct(read)
    names = tuple(name for each in read for name in each.served)
    longest = max(each.deployment["graceful_shutdown_timeout_s"] for each in read)
    return AppOptions(
        models=read,
        settings=_settings(server, names, "server"),
        ingress={"max_ongoing_requests": 10_000, "graceful_shutdown_timeout_s": longest, **ingress},
        replica_timeout=timeout,
    )


def _read_model(given: Any, server: Mapping[str, Any], place: str) -> ModelOptions:
    keys = dict(_mapping(given, place.rstrip(".") or "args"))
    model = keys.pop("model", None)
    if not isinstance(model, str) or not model:
        raise ConfigurationError(f"{place}model={model!r}: expected a folder, a hub name, or tiny")
    names = keys.pop("served_model_name", model)
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigurationError(f"{place}served_model_name={names!r}: expected a name, or a list of names")
    routing = keys.pop("routing", "load")
    if routing not in _ROUTINGS:
        raise ConfigurationError(f"{place}routing={routing!r}: expected one of {', '.join(_ROUTINGS)}")
    engine = _mapping(keys.pop("engine", {}), f"{place}engine")
    own = _mapping(keys.pop("server", {}), f"{place}server")
    deployment = _mapping(keys.pop("deployment", {}), f"{place}deployment")
    _refuse(keys, place.rstrip(".") or "args", "model, served_model_name, engine, server, deployment, routing")
    try:
        config = EngineConfig.create(model, **{key: engine[key] for key in engine if key not in _OF_ENGINE_CALL})
    except TypeError as error:
        raise ConfigurationError(f"{place}engine: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}engine: {error}") from error
    shared = {key: value for key, value in server.items() if key not in ("api_keys", "allowed_origins")}
    return ModelOptions(
        model=model,
        names=tuple(names),
        engine=engine,
        settings=_settings({**shared, **own}, tuple(names), f"{place}server"),
        deployment=_deployment(deployment, routing, config.max_num_seqs),
        adapters={each.lora_name: each.lora_path for each in config.lora_modules},
    )


def _deployment(given: Mapping[str, Any], routing: str, rows: int) -> dict[str, Any]:
    """Ray's options, with defaults that fit an engine with so many rows."""
    options: dict[str, Any] = {
        # Twice the rows: a row that becomes free has its next request at once, not after Ray's router has retried.
        "max_ongoing_requests": 2 * rows,
        "max_queued_requests": DEFAULT_MAX_QUEUED_REQUESTS,
        "graceful_shutdown_timeout_s": DEFAULT_DRAIN_SECONDS,
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": 3,
        **given,
    }
    scaling = options.get("autoscaling_config")
    if isinstance(scaling, Mapping):
        options["autoscaling_config"] = {"target_ongoing_requests": rows, **scaling}
    if routing in _ROUTERS and "request_router_config" not in given:
        keywords = {"imbalanced_threshold": rows, "do_eviction": True} if routing == "prefix" else {}
        options["request_router_config"] = {
            "request_router_class": _ROUTERS[routing],
            "request_router_kwargs": keywords,
        }
    return options


def _settings(given: Mapping[str, Any], names: tuple[str, ...], place: str) -> ServerSettings:
    allowed = [field.name for field in attrs.fields(ServerSettings) if field.name not in _OF_RAY]
    _refuse({key: value for key, value in given.items() if key not in allowed}, place, ", ".join(allowed))
    lists = {key: tuple(given[key]) for key in ("api_keys", "allowed_origins") if key in given}
    return ServerSettings(model_names=names, **{**given, **lists})


def _check_distinct(models: Sequence[ModelOptions]) -> None:
    names = [name for model in models for name in model.served]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"the name {twice!r} is given to several models or adapters; each needs its own")
    places = [model.deployment_name for model in models]
    if len(set(places)) < len(places):
        raise ConfigurationError(f"these names of models make the same name of a deployment: {', '.join(places)}")


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{place}: expected a mapping, got {type(value).__name__}")
    return value


def _seconds(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigurationError(f"{place}={value!r}: expected a positive number of seconds")
    return float(value)


def _refuse(unknown: Mapping[str, Any], place: str, known: str) -> None:
    if unknown:
        raise ConfigurationError(f"{place}: unknown key {next(iter(unknown))!r}; known: {known}")
