"""Makes the application: an ingress, and a deployment for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from specplug.errors import ConfigurationError
from specplug_ray.ingress import Ingress
from specplug_ray.options import ModelOptions, read_options
from specplug_ray.replica import EngineReplica

_INGRESS = "specplug-ingress"


def build(args: Mapping[str, Any]) -> Application:
    """See `build_openai_app`."""
    options = read_options(args)
    models = [_model(model) for model in options.models]
    ingress = _deployment(serve.ingress()(Ingress), _INGRESS, options.ingress, "ingress")
    return ingress.bind(options, *models)


def _model(model: ModelOptions) -> Application:
    deployment = _deployment(EngineReplica, model.deployment_name, model.deployment, "deployment")
    return deployment.bind(model.model, dict(model.engine), model.settings)


def _deployment(kind: type, name: str, options: Mapping[str, Any], place: str) -> serve.Deployment:
    """Ray's own checks of the options, with a place to look at."""
    try:
        return serve.deployment(name=name, **options)(kind)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigurationError(f"{place}: {error}") from error
