"""LoRA adapters over HTTP: picked by the model's name, listed, loaded and unloaded at run time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from specplug import AsyncLLM, LoRARequest, RequestError, SamplingParams, resolve_model
from specplug.server.metrics import ServerMetrics
from support.adapters import save_adapter
from support.serving import OPTIONS, Live, live

BODY = {"prompt": "import os\n\nclass", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    tiny = Path(resolve_model("tiny"))
    return [save_adapter(root / name, tiny, seed=seed, size=0.05) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Live]:
    metrics = ServerMetrics("tiny")
    options: dict[str, Any] = {**OPTIONS, "lora_modules": {"a": folders[0]}, "max_loras": 2, "check_parity": False}
    with (
        AsyncLLM("tiny", observers=[metrics.observer], **options) as engine,
        live(engine, metrics, updates_adapters=True) as running,
    ):
        yield running


def text(http: httpx.Client, **body: Any) -> str:
    response = http.post("/v1/completions", json={**BODY, **body})
    assert response.status_code == 200, response.text
    assert response.json()["model"] == body.get("model", "tiny")
    return response.json()["choices"][0]["text"]


def test_the_models_name_picks_the_adapter(server: Live, http: httpx.Client) -> None:
    plain, adapted = text(http), text(http, model="a")
    assert plain != adapted
    assert text(http, model="tiny") == plain
    assert text(http, model="a") == adapted  # from cached blocks
    chat = {"messages": [{"role": "user", "content": "import"}], "max_tokens": 8, "temperature": 0}
    answers = [http.post("/v1/chat/completions", json={**chat, "model": name}).json() for name in ("tiny", "a")]
    assert answers[0]["choices"][0]["message"] != answers[1]["choices"][0]["message"]
    with http.stream("POST", "/v1/completions", json={**BODY, "model": "a", "stream": True}) as stream:
        assert '"model": "a"' in stream.read().decode() or '"model":"a"' in stream.read().decode()


def test_adapters_are_listed_with_their_parent(server: Live, http: httpx.Client, folders: list[Path]) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "a"]
    assert (cards["tiny"]["root"], cards["tiny"]["parent"]) == ("tiny", None)
    assert (cards["a"]["root"], cards["a"]["parent"]) == (str(folders[0]), "tiny")
    assert http.get("/v1/models/a").json() == cards["a"]
    error = http.post("/v1/completions", json={**BODY, "model": "b"})
    assert (error.status_code, error.json()["error"]["message"]) == (404, "there is no model 'b' here; served: tiny, a")


def test_loading_and_unloading_at_run_time(server: Live, http: httpx.Client, folders: list[Path]) -> None:
    def load(name: str, path: Path | str) -> httpx.Response:
        return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    response = load("b", folders[1])
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'b' added successfully.")
    texts = [text(http, model=name) for name in ("tiny", "a", "b")]
    assert len(set(texts)) == 3
    for name, path, message in [
        ("b", folders[2], "there is a model 'b' already"),
        ("tiny", folders[2], "there is a model 'tiny' already"),
        ("c", folders[2], "no room for the adapter 'c': max_loras=2"),
        ("c", "nowhere/at/all", "is not a folder with a checkpoint"),
    ]:
        response = load(name, path)
        assert (response.status_code, message in response.json()["error"]["message"]) == (400, True), response.text
    response = http.post("/v1/unload_lora_adapter", json={"lora_name": "b"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'b' removed successfully.")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "b"}).status_code == 404
    assert http.post("/v1/completions", json={**BODY, "model": "b"}).status_code == 404
    assert load("b", folders[2]).status_code == 200  # another one of the same name
    assert text(http, model="b") not in texts
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "b"}).status_code == 200
    server.wait_idle()


def test_without_the_flag_there_is_nothing_to_load_with(server: Live) -> None:
    with live(server.engine) as other, httpx.Client(base_url=other.url, timeout=60) as http:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert http.post(path, json={"lora_name": "x", "lora_path": "y"}).status_code == 404
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["tiny", "a"]


def test_async_llm(server: Live, folders: list[Path]) -> None:
    engine, params = server.engine, SamplingParams(temperature=0, max_tokens=8)

    async def last(wanted: Any) -> Any:
        outputs = [each async for each in engine.generate("import os", params, lora_request=wanted)]
        return outputs[-1]

    async def run() -> None:
        wanted = LoRARequest("c", 7, folders[2])
        answers = await asyncio.gather(last(None), last("a"), last(wanted))
        assert len({answer.outputs[0].text for answer in answers}) == 3
        assert [answer.lora_request and answer.lora_request.lora_name for answer in answers] == [None, "a", "c"]
        assert engine.list_loras() == {1, 7}
        assert await engine.remove_lora(7)
        assert await engine.add_lora(wanted)
        assert (await last("c")).outputs[0].text == answers[2].outputs[0].text
        assert await engine.remove_lora(7)
        with pytest.raises(RequestError, match="no adapter 'c' is loaded"):
            await last("c")

    asyncio.run(run())
