"""A new package from templates: `string.Template` texts in `templates/common`, `templates/token` and `templates/model`.

A template's name is the file's, with `.in` at its end, `+` for a folder's separator, and `NAME` for the module's name.
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
_LONGEST = 40


def write_package(name: str, kind: str, out: Path) -> tuple[Path, list[str]]:
    """Writes a package.

    Args:
        name: the method's name; its package and module are named after it.
        kind: `token` or `model`.
        out: the folder it is written in, made where it is missing.

    Returns:
        The new folder, and the files in it.

    Raises:
        ConfigurationError: the name cannot be a method's and a distribution's, an installed package has it, or the folder
            exists or cannot be written.
    """
    method = method_name(name)
    _refuse_taken(method)
    folder = out.expanduser() / distribution_name(method)
    if folder.exists() or folder.is_symlink():
        raise ConfigurationError(f"{folder} exists; nothing is written over: choose another name or --out")
    values = _values(method)
    files = {
        place.replace("NAME", values["module"]): Template(text).substitute(values)
        for place, text in (*_templates("common"), *_templates(kind))
    }
    try:
        for place, text in files.items():
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder, sorted(files)


def method_name(name: str) -> str:
    """The method's name: lower case, words joined by underscores.

    Raises:
        ConfigurationError: it cannot be one.
    """
    given = name.removeprefix(f"{CORE}-").removeprefix(f"{CORE}_")
    method = re.sub(r"[-_]+", "_", given.lower())
    if not _NAME.fullmatch(given) or len(method) > _LONGEST:
        raise ConfigurationError(
            f"name {name!r}: expected a letter, then letters, digits, - or _ (not at the end), at most {_LONGEST} in all"
        )
    if keyword.iskeyword(method):
        raise ConfigurationError(f"name {name!r} is a word of Python's own; choose another")
    return method


def distribution_name(method: str) -> str:
    """The name of the package of a method."""
    return f"{CORE}-{method.replace('_', '-')}"


def _refuse_taken(method: str) -> None:
    """Two packages with one method are both unusable, and a package of the same name would replace the installed one."""
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
