"""What terminals and files are sent."""

from __future__ import annotations

import io
import os
import pty
import re
import select
from typing import TYPE_CHECKING

import pytest

from specplug.cli.memory_view import draw_bar, show_memory
from specplug.cli.plan_report import PlanReport
from specplug.cli.startup_view import StartupView
from specplug.cli.table import Table
from specplug.cli.terminal import Terminal
from specplug.cli.text_view import TextView
from specplug.config.engine import EngineConfig
from specplug.engine.startup import StepReport
from specplug.llm import StreamedPiece
from specplug.memory.plan import MemoryPlan
from specplug.request import SpeculationStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[], Terminal], Callable[[], str]]]:
    """Makes a terminal of 80 columns, and reads what it was sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    inside, outside = pty.openpty()
    stream = os.fdopen(outside, "w", encoding="utf-8")

    def read() -> str:
        stream.flush()
        data = b""
        while select.select([inside], [], [], 0.1)[0]:
            data += os.read(inside, 4096)
        return data.decode().replace("\r\n", "\n")

    yield lambda: Terminal(stream), read
    stream.close()
    os.close(inside)


def piece(**texts: str) -> StreamedPiece:
    """A piece whose tokens come from the methods named; `target` is the target's own."""
    sources = [None if name == "target" else name for name in texts]
    return StreamedPiece("0", 0, [0] * len(texts), sources, list(texts.values()), None, SpeculationStats())


def test_drafts_are_coloured_on_a_terminal(screen: tuple[Callable[[], Terminal], Callable[[], str]]) -> None:
    terminal, read = screen
    view = TextView(terminal(), ["one", "two"])
    view.show(piece(one="a", two="b", target="c\n"))
    view.close()
    assert read() == "\x1b[32ma\x1b[0m\x1b[36mb\x1b[0mc\n"
    assert view.legend == "green: drafted by one, cyan: drafted by two; the rest is the target's own"


def test_no_color_is_honoured(
    screen: tuple[Callable[[], Terminal], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal, read = screen
    view = TextView(terminal(), ["one"])
    view.show(piece(one="a", target="b"))
    view.close()
    assert read() == "ab\n"
    assert view.legend == ""


def test_a_model_cannot_send_control_characters_to_a_terminal(
    screen: tuple[Callable[[], Terminal], Callable[[], str]],
) -> None:
    terminal, read = screen
    terminal().generated("a\x1b[2J\x9b\rb\n")
    assert read() == "a[2Jb\n"
    file = io.StringIO()
    Terminal(file).generated("a\x1b[2J\rb\n")
    assert file.getvalue() == "a\x1b[2J\rb\n"


def test_indented_text_keeps_its_blank_lines() -> None:
    file = io.StringIO()
    view = TextView(Terminal(file), [], indent="  | ")
    view.prompt("def f():")
    for text in ("\n    ", "x\n", "\n", "y"):
        view.show(piece(target=text))
    view.close()
    assert file.getvalue() == "  | def f():\n  |     x\n  |\n  | y\n"


def test_tables_wrap_on_a_terminal_only(screen: tuple[Callable[[], Terminal], Callable[[], str]]) -> None:
    terminal, read = screen
    table = Table(("NAME", "NUMBER", "TEXT"), [("a", "1", "word " * 30), ("bb", "22", "")], right=(1,))
    table.show(terminal())
    lines = read().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert lines[0] == "NAME  NUMBER  TEXT"
    assert lines[1].startswith("a          1  word word")
    assert len(lines) == 5
    assert lines[2].startswith(" " * 14 + "word")
    assert max(map(len, lines)) <= 80
    file = io.StringIO()
    table.show(Terminal(file))
    assert len(file.getvalue().splitlines()) == 3


@pytest.mark.parametrize(
    ("share", "smooth", "bar"),
    [
        (0, True, ""),
        (1, True, "█" * 8),
        (0.5, True, "████"),
        (0.3, True, "██▍"),
        (1e-9, True, "▏"),
        (0, False, ""),
        (1, False, "########"),
        (0.3, False, "##"),
        (1e-9, False, "#"),
    ],
)
def test_bars(share: float, smooth: bool, bar: str) -> None:
    assert draw_bar(share, 8, smooth=smooth) == bar


def test_a_memory_plan_is_drawn_to_scale() -> None:
    plan = MemoryPlan(1 << 30, 10, 16, 160, 512 << 20, 256 << 20, 128 << 20, 64 << 20, 0)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_memory(Terminal(stream), plan)
    stream.seek(0)
    lines = stream.read().splitlines()
    assert lines[0] == "Memory plan: 960.0 MiB of a budget of 1.0 GiB"
    assert [line.count("#") for line in lines[1:]] == [16, 8, 4, 2, 0]
    assert lines[1].endswith("512.0 MiB   53%")


def test_steps_are_shown_while_they_run_only_on_a_terminal(
    screen: tuple[Callable[[], Terminal], Callable[[], str]],
) -> None:
    def start(terminal: Terminal) -> None:
        with StartupView(terminal) as view:
            view(StepReport(0, "compile", elapsed=12.3))
            view(StepReport(0, "compile", 13.0, 1.0))
            view(StepReport(3, "load draft weights"))
            view(StepReport(3, "load draft weights", fraction=0.5))
            view(StepReport(3, "load draft weights", 1.5, 1.0))
            view(StepReport(4, "allocate"))
            raise KeyError

    terminal, read = screen
    with pytest.raises(KeyError):
        start(terminal())
    live = read()
    assert "50%" in live
    assert "12 s so far" in live
    assert live.count("\r") == 7
    file = io.StringIO()
    with pytest.raises(KeyError):
        start(Terminal(file))
    assert file.getvalue().splitlines() == [
        f"  0/6 {'compile':<36}  13.00 s",
        f"  3/6 {'load draft weights':<36}   1.50 s",
        f"  4/6 {'allocate':<36}failed",
    ]


def plain(text: str) -> str:
    """Text without its styles."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def widest(text: str) -> int:
    return max(map(len, plain(text).splitlines()))


def test_a_narrow_terminal_gets_the_columns_of_a_table_one_below_the_other(
    screen: tuple[Callable[[], Terminal], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal, read = screen
    rows = [
        ("lookup", "acme-lookup", "1.2.3", "ok", "a summary of many words, of which some wrap"),
        ("b", "c", "", "", ""),
    ]
    seen: list[int] = []
    Table(("METHOD", "PACKAGE", "VERSION", "STATUS", "SUMMARY"), rows).show(terminal(), below=seen.append)
    text = read()
    assert widest(text) <= 40
    assert seen == [0, 1]
    words = plain(text).split()
    assert words.count("METHOD") == words.count("lookup") == 2
    for word in ("PACKAGE", "VERSION", "STATUS", "SUMMARY", "acme-lookup", "1.2.3", "ok", "wrap"):
        assert words.count(word) == 1


def test_the_tables_of_bench_fit_a_narrow_terminal(
    screen: tuple[Callable[[], Terminal], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal, read = screen
    header = ("method", "tokens/s", "x plain", "95 % interval", "first token", "next token", "accepted", "by position")
    row = (
        "draft_model",
        "1,234.5",
        "1.75",
        "1.70 to 1.80",
        "123.4 / 567.8",
        "12.3 / 45.6",
        "3.21",
        "90% 80% 70% 60% 50% 40%",
    )
    Table(header, [row], right=(1, 2, 3, 4, 5, 6)).show(terminal())
    assert widest(read()) <= 40


@pytest.mark.parametrize("colour", [True, False])
def test_a_plan_fits_a_narrow_terminal(
    screen: tuple[Callable[[], Terminal], Callable[[], str]], monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal, read = screen
    config = EngineConfig.create("tiny", memory="200MiB", speculative_config={"method": "ngram"}, device="cpu")
    plan = MemoryPlan(200 << 20, 4128, 16, 2048, 12 << 20, 100 << 20, 1 << 20, 9 << 20, 1 << 20)
    report = PlanReport(
        config, plan, "LlamaForCausalLM", "bfloat16", "cpu", 4096, "", (("ngram", 8), ("draft_model", 8)), 0
    )
    report.show(terminal())
    text = plain(read())
    assert widest(text) <= 40
    for name, _ in plan.parts:
        assert f"{name} " in text
    assert "Longest sequence: 2,048 tokens" in text
