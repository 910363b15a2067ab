"""`specplug chat`: through a pseudo-terminal, and with standard input that is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

ENGINE = ("--memory", "256MiB", "--no-compile")
DRAFTS = ("--speculative-config", '{"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3}')
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def take_terminal() -> None:
    """Makes standard input the terminal that Ctrl-C interrupts this process from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Chat:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._own, other = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specplug", "chat", "tiny", *ENGINE, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**kept, "TERM": "xterm-256color", **environment},
            preexec_fn=take_terminal,
            start_new_session=True,
        )
        os.close(other)
        self._seen = ""

    def sees(self, pattern: str, seconds: float) -> bool:
        """Reads until the pattern has come, or the time is over."""
        deadline = time.monotonic() + seconds
        while re.search(pattern, self._seen) is None:
            if time.monotonic() > deadline:
                return False
            if select.select([self._own], [], [], min(seconds, 1))[0]:
                try:
                    self._seen += os.read(self._own, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    pytest.fail(f"it ended: {self._seen}")
        return True

    def until(self, pattern: str) -> str:
        """Reads until the pattern has come; returns what came, that included."""
        assert self.sees(pattern, 120), self._seen
        found = re.search(pattern, self._seen)
        assert found is not None
        text, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def say(self, text: str) -> None:
        self.type(f"{text}\n")

    def end(self) -> int:
        """The exit status, once the rest is read."""
        while True:
            try:
                if not os.read(self._own, 4096):
                    break
            except OSError:
                break
        status = self.process.wait(60)
        os.close(self._own)
        return status


@pytest.mark.slow
def test_a_chat_in_a_terminal() -> None:
    """Colours, commands, an answer that Ctrl-C stops, the conversation goes on, and Ctrl-D ends it."""
    chat = Chat(*DRAFTS, "--max-tokens", "24")
    start = chat.until("> ")
    assert "No chat template" in start
    assert "drafted by draft_model" in start
    chat.say("x = [0, 1, 0, 1,")
    answer = chat.until(r"\n\S*> ")
    assert "\x1b[32m" in answer  # a drafted token is green
    chat.say("/stats")
    assert re.search(r"draft_model +\d+ accepted of \d+ drafted", chat.until(r"\n\S*> "))
    chat.say("/help")
    assert "/system" in chat.until(r"\n\S*> ")
    for _ in range(30):  # one that comes just before readline waits for a key is noticed with the next
        chat.type("\x03")
        if chat.sees("Ctrl-D", 1):
            break
    chat.until("Ctrl-D")
    chat.until("> ")
    chat.type("\x04")
    assert chat.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat() -> None:
    chat = Chat("--max-tokens", "1900", "--logit-bias", '{"0": -100}', NO_COLOR="1")
    chat.until("> ")
    chat.say("x = [0, 1, 0, 1,")
    chat.until(r"\r\n.{8}")  # the answer has begun
    started = time.monotonic()
    chat.type("\x03")
    stopped = chat.until(r"Stopped\.")
    assert time.monotonic() - started < 10
    assert "\x1b[32m" not in stopped
    chat.until("> ")
    chat.say("/stats")
    assert "first token after" in chat.until("> ")
    chat.say("/quit")
    assert chat.end() == 0


def test_without_a_terminal(run: Callable[..., Result], lookup: str) -> None:
    """Each line is a message; the answers are plain, and continue the text so far."""
    said = "x = [0, 1, 0, 1,\n/stats\n/system\n/system Be brief.\n/clear\n/what\n/quit\nnever read\n"
    result = run("chat", "tiny", *ENGINE, "--max-tokens", "12", "--speculative-config", lookup, stdin=said)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    plain = run("generate", "tiny", *ENGINE, "--max-tokens", "12", "--prompt", "x = [0, 1, 0, 1,", "--quiet")
    assert plain.stdout.rstrip("\n") in result.stdout
    assert "lookup " in result.stderr
    for text in ("no system message", "System: Be brief.", "conversation is empty", "unknown command /what"):
        assert text in result.stderr
    assert "never read" not in result.output


def test_a_template_is_used(run: Callable[..., Result], tmp_path: Path) -> None:
    """A line that ends with a backslash goes on; two slashes begin a message with one."""
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    arguments = ("--max-tokens", "4", "--chat-template", str(file), "--quiet")
    result = run("chat", "tiny", *ENGINE, *arguments, stdin="one\\\ntwo\n//three\n")
    assert result.exit_code == 0, result.output
    assert "No chat template" not in result.output
    prompt = "<user>one\ntwo\n<assistant>"
    plain = run("generate", "tiny", *ENGINE, "--max-tokens", "4", "--prompt", prompt, "--quiet")
    assert result.stdout.startswith(plain.stdout.rstrip("\n"))


def test_a_conversation_that_fills_the_context(run: Callable[..., Result]) -> None:
    """It is an error of that message alone."""
    options = ("--max-model-len", "32", "--max-tokens", "4", "--quiet")
    result = run("chat", "tiny", *ENGINE, *options, stdin=f"{'word ' * 40}\nx = 1\n")
    assert result.exit_code == 0, result.output
    assert "fills the context; /clear empties it" in result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n", "2"), "one answer to each message"),
        (("--chat-template", "x", "--no-chat-template"), "exclude each other"),
        (("--chat-template", "/no/such/file"), "cannot be read"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_refusals(run: Callable[..., Result], arguments: tuple[str, ...], message: str) -> None:
    result = run("chat", "tiny", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
