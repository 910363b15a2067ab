"""The files of the playground: their headers, who may read them, and that they ask nobody else for anything."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest

from specplug.server.app import create_app
from specplug.server.pages import PAGE_PATHS
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState

pytestmark = pytest.mark.unit
FOLDER = files("specplug.server") / "playground"


async def get(path: str, **settings: object) -> httpx.Response:
    state = ServerState(ServerSettings(model_names=("tiny",), **settings))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.get(path)


def read(path: str, **settings: object) -> httpx.Response:
    import asyncio

    return asyncio.run(get(path, **settings))


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_files_need_no_key_and_have_strict_headers(path: str) -> None:
    response = read(path, api_keys=("secret",))
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_endpoints_behind_it_need_the_key() -> None:
    assert read("/v1/specplug/info", api_keys=("secret",)).status_code == 401
    assert read("/playground/", api_keys=("secret",)).status_code == 401
    assert read("/playground/index.html").status_code == 404
    assert read("/playground/../pages.py").status_code == 404


def test_it_can_be_turned_off() -> None:
    assert read("/", playground=False).status_code == 404
    assert read("/playground/app.js", playground=False).status_code == 404
    assert read("/", playground=False, api_keys=("secret",)).status_code == 401


def test_every_file_is_served_and_asks_nobody_else() -> None:
    """No file is forgotten, no address of another host is in any, and modules import only each other."""
    names = {each.name for each in FOLDER.iterdir()}
    assert {f"/playground/{name}" for name in names - {"index.html"}} | {"/"} == PAGE_PATHS
    for name in names:
        text = (FOLDER / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, name
        for imported in re.findall(r'from "([^"]+)"', text):
            assert imported.removeprefix("./") in names, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function", text), name
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|<style>|\sstyle=|\son[a-z]+=", page)
