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
        ConfigurationError: a key is unknown, missing or has an invalid value; the message names it.
    """
    from specplug_ray.build import build

    return build(args)
