"""`LLM.chat`: the template's text becomes the prompt; what it cannot render is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, SamplingParams
from specplug.errors import RequestError
from specplug.testing.models import save_words
from support.engines import assert_idle
from support.models import VOCABULARY, save_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if tools %}tools={{ tools|length }}{% endif %}{% if mood is defined %}mood={{ mood }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "def f("}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("tiny", memory="64MiB", max_model_len=256) as llm:
        yield llm


def rendered(llm: LLM, *args: Any, **options: Any) -> list[str]:
    outputs = llm.chat(*args, sampling_params=GREEDY, **options)
    return [llm.get_tokenizer().decode(output.prompt_token_ids) for output in outputs]


def test_chat_renders_the_template(tiny: LLM) -> None:
    reply = {"role": "assistant", "content": "x):"}
    whole = "<user>def f(</user>"
    assert rendered(tiny, [USER], chat_template=TEMPLATE) == [whole + "<assistant>"]
    assert rendered(tiny, [USER], chat_template=TEMPLATE, add_generation_prompt=False) == [whole]
    assert rendered(tiny, [USER, reply], chat_template=TEMPLATE, continue_final_message=True) == [
        whole + "<assistant>x):"
    ]
    assert rendered(tiny, [[USER], [USER, reply, USER]], chat_template=TEMPLATE) == [
        whole + "<assistant>",
        f"{whole}<assistant>x):</assistant>{whole}<assistant>",
    ]
    tools = [{"type": "function", "function": {"name": "g", "parameters": {}}}]
    assert rendered(tiny, [USER], chat_template=TEMPLATE, tools=tools, chat_template_kwargs={"mood": 3}) == [
        whole + "tools=1mood=3<assistant>"
    ]
    assert rendered(tiny, [], chat_template=TEMPLATE) == []
    text = tiny.generate(whole + "<assistant>", GREEDY)[0]
    chat = tiny.chat([USER], GREEDY, chat_template=TEMPLATE)[0]
    assert (chat.outputs, chat.prompt_token_ids) == (text.outputs, text.prompt_token_ids)
    assert chat.outputs[0].text == tiny.get_tokenizer().decode(chat.outputs[0].token_ids)


def test_chat_refusals(tiny: LLM, folder: Path) -> None:
    with pytest.raises(RequestError, match="no chat template; give one with chat_template="):
        tiny.chat([USER], GREEDY)
    for messages in ([{"role": "bad", "content": ""}], [[]], [[USER], [5]], "hello"):
        with pytest.raises(RequestError, match="the chat template cannot render the messages"):
            tiny.chat(messages, GREEDY, chat_template=TEMPLATE)
    with pytest.raises(RequestError, match="cannot render"):
        tiny.chat([USER], GREEDY, chat_template="{% if %}")
    assert_idle(tiny)
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", check_parity=False) as llm:
        for call, purpose in (
            (lambda: llm.chat([USER], GREEDY, chat_template=TEMPLATE), "chat"),
            (lambda: llm.generate("w3."), "a prompt given as text"),
            (llm.get_tokenizer, r"get_tokenizer\(\)"),
            (lambda: llm.generate([3], SamplingParams(stop="a")), "stop strings need"),
            (lambda: llm.generate([3], SamplingParams(bad_words="a")), "bad_words"),
        ):
            with pytest.raises(RequestError, match=f"{purpose}.*tokenizer"):
                call()
        output = llm.generate([3], GREEDY)[0].outputs[0]
        assert (output.text, len(output.token_ids)) == ("", 8)
        assert_idle(llm)


@pytest.mark.parametrize("messages", [None, 5])
def test_messages_of_another_type_are_refused(tiny: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        tiny.chat(messages, GREEDY, chat_template=TEMPLATE)
