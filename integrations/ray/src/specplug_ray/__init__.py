"""specplug's server as an application of Ray Serve. Importing this module does not import Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build_openai_app"]


def build_openai_app(args: Mapping[str, Any]) -> Application:
    """Builds an application of Ray Serve with OpenAI's endpoints, for `serve.run` or as `import_path` of a configuration file.

    Args:
        args: either `model` and the other keys of one model, or `models`, a list of such mappings; beside them `server`,
            `ingress` and `replica_timeout`. docs/ray.md has all keys.

    Returns:
        An ingress and one deployment for each model. Nothing is started or loaded.

    Raises:
        ConfigurationError: a key is unknown, missing or has an invalid value, which the message names; or there is no Ray.
    """
    try:
        from specplug_ray.build import build
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        from specplug.errors import ConfigurationError

        raise ConfigurationError("Ray is not installed: pip install 'ray[serve]'") from error
    return build(args)
