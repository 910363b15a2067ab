"""The playground: a page that shows speculation at work. Its files are served as they lie in `playground/`."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER = "playground"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "run.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "step.js": "text/javascript; charset=utf-8",
    "tree.js": "text/javascript; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
}
PAGE_PATHS = frozenset({"/", *(f"/{_FOLDER}/{name}" for name in _TYPES if name != "index.html")})
"""The paths of the playground; they need no API key, since they are the same everywhere."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Serves the playground at `/`."""
    folder = files("specplug.server") / _FOLDER
    for name, media_type in _TYPES.items():
        path = "/" if name == "index.html" else f"/{_FOLDER}/{name}"
        _add_page(app, path, Response((folder / name).read_bytes(), media_type=media_type, headers=_HEADERS))


def _add_page(app: FastAPI, path: str, page: Response) -> None:
    @app.get(path, include_in_schema=False, name=path)
    async def show() -> Response:
        return page
