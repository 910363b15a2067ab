"""Creates a package from templates: `string.Template` texts in `templates/common`, `templates/token`, `templates/model`.

The name of a template is that of the file with the suffix `.in`, `+` for the path separator, and `NAME` for the module.
"""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from packaging.utils import canonicalize_name

from specplug.errors import ConfigurationError
from specplug.plugins.finder import find_plugins
from specplug.version import __version__

CORE = "specplug"
KINDS = ("token", "model")
_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_MAX_LENGTH = 40


def write_package(name: str, kind: str, out: Path) -> tuple[Path, list[str]]:
    """Writes a package.

    Args:
        name: of the method; the names of package and module follow from it.
        kind: `token` or `model`.
        out: the parent folder, created if necessary.

    Returns:
        The new folder, and the files in it.

    Raises:
        ConfigurationError: the name is invalid, an installed package has it, or the folder exists or cannot be written.
    """
    method = method_name(name)
    _refuse_taken(method)
    folder = out.expanduser() / distribution_name(method)
    if folder.exists() or folder.is_symlink():
        raise ConfigurationError(f"{folder} already exists: choose another name or --out")
    values = _values(method)
    files = {
        path.replace("NAME", values["module"]): Template(text).substitute(values)
        for path, text in (*_templates("common"), *_templates(kind))
    }
    try:
        for path, text in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder, sorted(files)


def method_name(name: str) -> str:
    """Returns the name of the method: lower case, with underscores.

    Raises:
        ConfigurationError: the name is invalid.
    """
    given = name.removeprefix(f"{CORE}-").removeprefix(f"{CORE}_")
    method = re.sub(r"[-_]+", "_", given.lower())
    if not _NAME.fullmatch(given) or len(method) > _MAX_LENGTH:
        raise ConfigurationError(
            f"name {name!r}: expected a letter, then letters, digits, - or _ (not at the end), at most {_MAX_LENGTH} characters"
        )
    if keyword.iskeyword(method):
        raise ConfigurationError(f"name {name!r} is a Python keyword; choose another")
    return method


def distribution_name(method: str) -> str:
    """Returns the name of the package of a method."""
    return f"{CORE}-{method.replace('_', '-')}"


def _refuse_taken(method: str) -> None:
    """Refuses the name of an installed method or package: both methods would be unusable, or the package replaced."""
    for record in find_plugins():
        if record.method == method or canonicalize_name(record.distribution) == distribution_name(method):
            raise ConfigurationError(
                f"the installed package {record.distribution} provides the method '{record.method}': choose another name, or "
                f"uninstall it first (pip uninstall {record.distribution})"
            )


def _values(method: str) -> dict[str, str]:
    major, minor = __version__.split(".")[:2]
    return {
        "method": method,
        "distribution": distribution_name(method),
        "module": f"{CORE}_{method}",
        "speculator": "".join(word.capitalize() for word in method.split("_")) + "Speculator",
        "lower": f"{major}.{minor}",
        "upper": f"{major}.{int(minor) + 1}" if major == "0" else str(int(major) + 1),
    }


def _templates(kind: str) -> list[tuple[str, str]]:
    folder = resources.files("specplug.scaffold") / "templates" / kind
    return [
        (entry.name.removesuffix(".in").replace("+", "/"), entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".in")
    ]
