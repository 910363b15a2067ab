"""Runs the conversation of `specplug chat`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.options import make_params
from specplug.cli.process import import_libraries
from specplug.cli.run.kernels import start_without_kernels
from specplug.cli.views.startup import StartupView
from specplug.cli.views.stats import Meter, show_meter
from specplug.cli.views.text import TextView
from specplug.errors import EngineDeadError, RequestError, SpecplugError

if TYPE_CHECKING:
    from specplug.async_llm import AsyncLLM
    from specplug.cli.terminal import Terminal
    from specplug.outputs import CompletionOutput
    from specplug.text.prompts import EncodedPrompt

_HELP = """\
/help            this list
/stats           speed and acceptance of the last answer
/system [TEXT]   show the system message, or replace it; /system - removes it
/clear           forget the conversation, not the system message
/quit            end the chat, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ is continued. A message that begins with / is written with //."""
_BARE = (
    "No chat template: the model continues the bare text of this conversation. Give one with --chat-template, or write the "
    "beginning of a text."
)
_PROMPT, _CONTINUED = "> ", ". "


@attrs.frozen
class ChatJob:
    """The input of `specplug chat`.

    Attributes:
        target: the model.
        engine: keywords of `AsyncLLM`.
        defaults: keywords of `SamplingParams` below those of the model.
        sampling: those of the command line.
        system: the system message.
        template: a chat template instead of the tokenizer's.
        has_template: whether a chat template is used if there is one.
        quiet: hide startup steps and hints.
    """

    target: str
    engine: dict[str, Any]
    defaults: dict[str, Any]
    sampling: dict[str, Any]
    system: str | None = attrs.field(kw_only=True)
    template: str | None = attrs.field(kw_only=True)
    has_template: bool = attrs.field(kw_only=True)
    quiet: bool = attrs.field(kw_only=True)


def run_job(job: ChatJob, out: Terminal, err: Terminal) -> None:
    """Starts the engine and talks until the input ends.

    Args:
        job: the input.
        out: receives the answers.
        err: receives everything else.

    Raises:
        SpecplugError: the engine does not start, or it stopped.
    """
    with StartupView(err, quiet=job.quiet) as view, contextlib.redirect_stdout(sys.stderr):
        view.announce("importing PyTorch and Transformers")
        import_libraries()
        from specplug.async_llm import AsyncLLM

        start_without_kernels(job.engine, err, quiet=job.quiet)
        llm = AsyncLLM(job.target, on_step=view, **job.engine)
    with llm, _plain_interrupts(), asyncio.Runner() as runner:
        Conversation(job, llm, out, err).run(runner)


class Conversation:
    """Reads messages and commands, and shows answers.

    Args:
        job: the input.
        llm: the engine.
        out: receives the answers.
        err: receives everything else.
    """

    def __init__(self, job: ChatJob, llm: AsyncLLM, out: Terminal, err: Terminal) -> None:
        from specplug.sampling.defaults import recommended_options
        from specplug.tiny import resolve_model

        recommended = recommended_options(resolve_model(llm.config.model), llm.config.revision, overridden=job.sampling)
        recommended.pop("max_tokens", None)
        self._params = make_params(job.defaults, recommended, job.sampling)
        self._job, self._llm, self._out, self._err = job, llm, out, err
        self._system = job.system
        self._messages: list[dict[str, str]] = []
        own = getattr(llm.get_tokenizer(), "chat_template", None)
        self._is_bare = not job.has_template or not (job.template or own)
        self._text = TextView(out, llm.engine.methods)
        self._meter: Meter | None = None
        self._is_live = sys.stdin.isatty() and out.is_live
        if self._is_live:
            with contextlib.suppress(ImportError):  # the lines of this chat can be recalled with the arrow keys
                import readline  # noqa: F401

    def run(self, runner: asyncio.Runner) -> None:
        """Talks until the input ends."""
        if self._is_bare:
            self._hint(_BARE)
        if self._is_live:
            self._hint(" ".join(filter(None, ["/help lists the commands; Ctrl-D ends the chat.", self._text.legend])))
        while True:
            try:
                message = self._read()
                if message is None or message in ("/quit", "/exit"):
                    break
                if message.startswith("/") and not message.startswith("//"):
                    self._command(message)
                elif message.strip():
                    self._answer(message.removeprefix("/") if message.startswith("//") else message, runner)
            except KeyboardInterrupt:  # while nothing was generated
                self._out.line()
                self._hint("Ctrl-D or /quit ends the chat.")
        if self._is_live:
            self._out.line()

    def _hint(self, text: str) -> None:
        if not self._job.quiet:
            self._err.paragraph(text, style="dim")

    def _read(self) -> str | None:
        """The next message; None at the end of the input."""
        lines: list[str] = []
        while True:
            if self._is_live:
                try:
                    line = input(_CONTINUED if lines else _PROMPT)
                except EOFError:
                    return None
            else:
                line = sys.stdin.readline()
                if not line:
                    return "\n".join(lines) if lines else None
                line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self._err.line(_HELP)
        elif name == "/clear":
            self._messages.clear()
            self._err.line("The conversation is empty.")
        elif name == "/stats":
            if self._meter is None or self._meter.metrics is None:
                self._err.line("There is no answer yet.")
            else:
                show_meter(self._err, self._meter, self._llm)
        elif name == "/system":
            if rest:
                self._system = None if rest == "-" else rest
            self._err.line("There is no system message." if self._system is None else f"System: {self._system}")
        else:
            self._err.line(f"unknown command {name}; /help lists them")

    def _answer(self, message: str, runner: asyncio.Runner) -> None:
        """Shows the answer to a message. After Ctrl-C, what was generated so far stays in the conversation."""
        self._messages.append({"role": "user", "content": message})
        parts: list[str] = []
        try:
            with contextlib.redirect_stdout(sys.stderr):  # plugins may print
                runner.run(self._generate(parts))
        except KeyboardInterrupt:
            self._text.close()
            self._hint("Stopped.")
        except EngineDeadError:
            raise
        except SpecplugError as error:
            self._text.close()
            self._err.paragraph(f"specplug: error: {error}")
            if not parts:
                self._messages.pop()
                return
        self._messages.append({"role": "assistant", "content": "".join(parts)})

    async def _generate(self, parts: list[str]) -> None:
        """Streams an answer to the terminal, and its text to `parts`."""
        from specplug.outputs import StreamedPiece

        prompt = await self._encode()
        room = self._llm.engine.plan.max_model_len - len(prompt.ids)
        if room < 1:
            raise RequestError(f"the conversation of {len(prompt.ids):,} tokens fills the context; /clear empties it")
        limit = self._params.max_tokens
        params = attrs.evolve(self._params, max_tokens=room if limit is None else min(limit, room))
        self._meter = meter = Meter()
        (stream,) = await self._llm.submit([prompt], params, output_kind="delta")
        try:
            async for output in stream:
                for completion in output.outputs:
                    piece = StreamedPiece(output.request_id, 0, *_shown(completion))
                    parts.append(completion.text)
                    meter.add(piece)
                    self._text.show(piece)
        finally:
            stream.close()
        self._text.close()
        if meter.finish_reason == "length":
            self._hint(f"The answer was cut off after {len(meter.token_ids)} tokens; see --max-tokens.")

    async def _encode(self) -> EncodedPrompt:
        if self._is_bare:
            texts = [] if self._system is None else [f"{self._system}\n"]
            for message in self._messages:
                ends = message["role"] == "user" or message["content"].endswith("\n")
                texts.append(message["content"] + ("" if ends else "\n"))
            return (await self._llm.encode("".join(texts)))[0]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        options: dict[str, Any] = {} if self._job.template is None else {"chat_template": self._job.template}
        return (await self._llm.render([*system, *self._messages], add_generation_prompt=True, **options))[0]


def _shown(completion: CompletionOutput) -> tuple[Any, ...]:
    """The fields of a `StreamedPiece`; text that was held back until the end belongs to no token."""
    sources, texts = list(completion.token_sources), list(completion.token_texts)
    if completion.text and not texts:
        sources, texts = [None], [completion.text]
    return (completion.token_ids, sources, texts, completion.finish_reason, completion.metrics, completion.error)


@contextlib.contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Makes Ctrl-C an ordinary interrupt while the chat runs: it ends an answer, and must not come again by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
