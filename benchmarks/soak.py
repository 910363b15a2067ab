"""A server at full load for minutes or hours, by clients that do everything clients do. Exits with 1 if anything went wrong.

    python benchmarks/soak.py --seconds 1800 --plot build/soak.svg --json build/soak.json

The server runs `tiny` in float32 with few KV blocks (rows are preempted), a short queue (it overflows), and a speculator that
raises or answers nonsense now and then, followed by ngram. Clients send completions and chats of random lengths, greedy and
sampled with random parameters, streamed or not; they disconnect, abort, set short deadlines, and send garbage. Checked:
every greedy output is plain decoding's, no 5xx but queue_full and timeout, nothing hangs; at the end no row, block or stream
is left, the memory has not grown, and SIGTERM lets the last requests end. Needs specplug[serve] and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

ROWS, QUEUED, CLIENTS = 8, 6, 20
LONGEST = 160
MEMORY = "30MiB"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SNIPPETS = (
    "import os\n\n\ndef main(",
    "class Node:\n    def __init__(self, value):\n",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n",
    "é 你好 = 'ß'\n",
    "# A list of names\nnames = ['a', 'b', 'c', 'd', 'a', 'b', 'c'",
    "try:\n    value = int(text)\nexcept ValueError",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n",
    "with open(path) as file:\n    for line in file:\n",
)
DONE = "data: [DONE]\n\n"
HARMLESS = {"queue_full", "timeout"}  # codes of meant 5xx


# ---- the server's process --------------------------------------------------------------------------------------------


class Flaky:
    """Repeats what followed the last token before; one call in 25 raises, one in 25 answers nonsense."""

    def __init__(self) -> None:
        from specplug import SpeculatorTraits

        self.traits = SpeculatorTraits(token_only=True)
        self._random = random.Random(0)
        self._failed = False

    def propose(self, batch: Any) -> Any:
        from specplug import Proposal

        luck = 1.0 if self._failed else self._random.random()  # three faults in a row would switch it off
        self._failed = luck < 0.08
        if luck < 0.04:
            raise RuntimeError("a fault on purpose")
        if luck < 0.08:
            return Proposal([[10**6]] * len(batch.rows))
        drafts = []
        for row in batch.rows:
            tokens = row.tokens[:]
            place = len(tokens) - 2
            while place >= 0 and tokens[place] != tokens[-1]:
                place -= 1
            most = min(row.budget.max_nodes, row.budget.max_depth)
            drafts.append(tokens[place + 1 : place + 1 + most] if place >= 0 else [])
        return Proposal(drafts)


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, in bytes."""

    _NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES)


class Allocations:
    """What the process has allocated, every 10 seconds: MiB of malloc in use, and memory blocks of Python's objects.

    Resident memory also holds what malloc keeps for later; it grows when free memory is in pieces, without any leak.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, int]] = []
        self._started = time.monotonic()
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = MallocInfo
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            gc.collect()
            info = self._libc.mallinfo2()
            in_use = (info.hblkhd + info.uordblks) / 2**20
            self.samples.append((round(time.monotonic() - self._started), round(in_use, 3), sys.getallocatedblocks()))
            time.sleep(10)


def serve() -> None:
    """The server; prints its address, and at the end what is left."""
    from specplug import AsyncLLM, hookimpl
    from specplug.server.app import create_app
    from specplug.server.process import Endpoint, run_server
    from specplug.server.settings import ServerSettings
    from specplug.server.state import ServerState

    class Speculator(Flaky):
        propose = hookimpl(Flaky.propose)

    allocations = Allocations()

    class Watched(AsyncLLM):
        def close(self) -> None:
            scheduler = self.engine.scheduler
            allocator = scheduler.allocator
            left = {
                "rows": len(scheduler.running) + len(scheduler.waiting),
                "blocks": allocator.num_blocks - allocator.num_free,
                "unfinished": self.num_unfinished,
                "preemptions": scheduler.num_preemptions,
                "faults": dict(self.engine.faults),
                "steps": self.engine.num_steps,
                "allocated": allocations.samples,
            }
            print(json.dumps(left), flush=True)
            super().close()

    state = ServerState(ServerSettings(model_names=("tiny",), chat_template=TEMPLATE, send_timeout=5.0))
    endpoint = Endpoint(port=0, drain_timeout=60)
    listener = endpoint.bind()
    fallback = {"method": "ngram", "num_speculative_tokens": 4}
    asyncio.run(
        run_server(
            create_app(state),
            state,
            endpoint,
            listener,
            lambda: Watched(
                "tiny",
                dtype="float32",
                compile=False,
                memory=MEMORY,
                max_num_seqs=ROWS,
                max_num_batched_tokens=128,
                max_model_len=1024,
                max_queued_requests=QUEUED,
                observers=[state.metrics.observer],
                plugins={"flaky": lambda config, target: Speculator()},
                speculative_config={"method": "flaky", "num_speculative_tokens": 3, "fallback": fallback},
            ),
            on_ready=lambda: print(endpoint.url(listener), flush=True),
        )
    )


def references() -> dict[str, list[int]]:
    """Plain decoding's greedy continuation of every snippet."""
    from specplug import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    with LLM("tiny", dtype="float32", compile=False, memory="256MiB", max_model_len=1024) as llm:
        outputs = llm.generate(list(SNIPPETS), params, use_tqdm=False)
        return {text: output.outputs[0].token_ids for text, output in zip(SNIPPETS, outputs, strict=True)}


# ---- the clients -----------------------------------------------------------------------------------------------------


@attrs.define
class Soak:
    """The load and what became of it.

    Attributes:
        url: the server's address.
        known: snippet → its greedy continuation.
        seed: of what the clients do.
        until: when the clients stop.
        counts: what happened, by kind.
        problems: what should not have happened.
    """

    url: str
    known: dict[str, list[int]]
    seed: int
    until: float
    counts: Counter[str] = attrs.field(factory=Counter)
    problems: list[str] = attrs.field(factory=list)

    async def client(self, number: int) -> None:
        """One client until the end."""
        dice = random.Random(1000 * self.seed + number)
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as http:
            actions = (
                (self.greedy, 40),
                (self.sampled, 25),
                (self.vanish, 10),
                (self.cancel, 6),
                (self.abort, 6),
                (self.deadline, 4),
                (self.invalid, 5),
                (self.garbage, 4),
            )
            while time.monotonic() < self.until:
                (action,) = dice.choices([a for a, _ in actions], [weight for _, weight in actions])
                try:
                    await action(http, dice)
                except Exception as error:
                    left = self.until - time.monotonic()
                    self.problems.append(
                        f"{action.__name__}, {left:.0f} s before the end: {type(error).__name__}: {error}"
                    )

    async def greedy(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        text, count = dice.choice(SNIPPETS), dice.randint(1, LONGEST)
        body = {"prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        body |= {"num_speculative_tokens": dice.randint(0, 4)} if dice.random() < 0.3 else {}
        ids = await self.ids_of(http, body, stream=dice.random() < 0.5)
        if ids is None:
            return
        self.counts["greedy"] += 1
        if ids != self.known[text][:count]:
            self.problems.append(f"greedy output differs: {text!r}, {count} tokens")

    async def ids_of(self, http: httpx.AsyncClient, body: dict[str, Any], *, stream: bool) -> list[int] | None:
        """The ids of the only choice; None if the request was refused."""
        if not stream:
            answer = await http.post("/v1/completions", json=body)
            return answer.json()["choices"][0]["token_ids"] if await self.is_good(answer) else None
        ids: list[int] = []
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if not await self.is_good(answer):
                return None
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    ids += event_of(line)["choices"][0]["token_ids"]
        return ids

    async def sampled(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        body: dict[str, Any] = {"temperature": dice.uniform(0, 2), "max_tokens": dice.randint(1, LONGEST)}
        options = (
            ("top_k", dice.randint(1, 50)),
            ("top_p", dice.uniform(0.1, 1)),
            ("min_p", dice.uniform(0, 0.3)),
            ("repetition_penalty", dice.uniform(0.8, 1.4)),
            ("frequency_penalty", dice.uniform(-1, 1)),
            ("seed", dice.randint(0, 9)),
            ("stop", ["\n\n", "def"]),
            ("n", dice.randint(1, 3)),
            ("logit_bias", {str(dice.randint(0, 4095)): dice.uniform(-5, 5)}),
            ("min_tokens", 1),
        )
        body |= {name: value for name, value in options if dice.random() < 0.3}
        if dice.random() < 0.5:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": long_prompt(dice)}]
            body |= {"logprobs": True, "top_logprobs": 2} if dice.random() < 0.3 else {}
        else:
            path = "/v1/completions"
            body["prompt"] = [long_prompt(dice) for _ in range(dice.randint(1, 2))]
            body |= {"logprobs": 2, "prompt_logprobs": 1} if dice.random() < 0.3 else {}
        if dice.random() < 0.5 and "prompt_logprobs" not in body:
            async with http.stream("POST", path, json={**body, "stream": True}) as answer:
                if await self.is_good(answer):
                    events_of((await answer.aread()).decode())
                    self.counts["sampled streams"] += 1
        elif await self.is_good(answer := await http.post(path, json=body)):
            assert answer.json()["usage"]["completion_tokens"] > 0
            self.counts["sampled"] += 1

    async def vanish(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """Leaves in the middle of a stream."""
        body = {"prompt": dice.choice(SNIPPETS), "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if not await self.is_good(answer):
                return
            left = dice.randint(0, 8)
            async for _ in answer.aiter_raw():
                left -= 1
                if left < 0:
                    break
        self.counts["vanished"] += 1

    async def cancel(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """Leaves before the response."""
        body = {"prompt": dice.choice(SNIPPETS), "max_tokens": 900, "ignore_eos": True}
        task = asyncio.ensure_future(http.post("/v1/completions", json=body))
        await asyncio.sleep(dice.uniform(0, 0.2))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.counts["cancelled"] += 1

    async def abort(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        name = f"{dice.getrandbits(60):x}"
        body = {"prompt": dice.choice(SNIPPETS), "max_tokens": 900, "ignore_eos": True, "request_id": name}
        task = asyncio.ensure_future(http.post("/v1/completions", json=body))
        await asyncio.sleep(dice.uniform(0, 0.3))
        await http.post("/abort", json={"request_id": name})
        task.cancel() if dice.random() < 0.3 else None
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(done, httpx.Response) and await self.is_good(done):
            self.counts[f"aborted: {done.json()['choices'][0]['finish_reason']}"] += 1

    async def deadline(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        body = {"prompt": dice.choice(SNIPPETS), "max_tokens": 900, "ignore_eos": True, "timeout": 0.1}
        await self.is_good(await http.post("/v1/completions", json=body))

    async def invalid(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        body = dice.choice(
            [{}, {"prompt": ""}, {"prompt": "x", "tools": [1]}, {"prompt": "x", "n": 0}, {"prompt": [9999]}]
        )
        answer = await http.post("/v1/completions", json=body)
        if answer.status_code not in (400, 503):
            self.problems.append(f"{body} gets {answer.status_code}")
        self.counts["invalid"] += 1

    async def garbage(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """Half a request on a connection of its own."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        writer.write(head[: dice.randint(1, len(head))])
        await writer.drain()
        await asyncio.sleep(dice.uniform(0, 0.1))
        writer.close()
        self.counts["garbage"] += 1

    async def is_good(self, answer: httpx.Response) -> bool:
        """Whether it is a 200; what should not be is noted."""
        if answer.status_code == 200:
            return True
        await answer.aread()
        code = answer.json()["error"]["code"] if answer.status_code >= 400 else None
        self.counts[f"{answer.status_code} {code}"] += 1
        if code not in HARMLESS:
            self.problems.append(f"{answer.status_code}: {answer.text[:300]}")
        if code == "queue_full":
            await asyncio.sleep(random.uniform(0.2, 1))
        return False


def event_of(line: str) -> dict[str, Any]:
    """The JSON of a line of a stream. A text may contain the word "error" in any form; only an error object is one."""
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise RuntimeError(f"an error in a stream: {event['error']}")
    return event


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, which must be complete."""
    if not text.endswith(DONE):
        raise RuntimeError(f"a stream ends with {text[-200:]!r}")
    return [event_of(line) for line in text.removesuffix(DONE).split("\n\n") if line]


def long_prompt(dice: random.Random) -> str:
    """A prompt of up to 600 characters; several of them fill the KV cache."""
    return (dice.choice(SNIPPETS) * 60)[: dice.randint(20, 600)]


# ---- the run ---------------------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


async def watch(pid: int, soak: Soak, samples: list[tuple[float, int]]) -> None:
    """Samples the server's memory."""
    started = time.monotonic()
    while time.monotonic() < soak.until:
        samples.append((time.monotonic() - started, resident_bytes(pid)))
        await asyncio.sleep(1)


def in_engine(metrics: str) -> float:
    """Requests that run or wait in the engine."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(names))


async def run(
    server: subprocess.Popen[str], url: str, known: dict[str, list[int]], seconds: float, seed: int
) -> dict[str, Any]:
    soak = Soak(url, known, seed, time.monotonic() + seconds)
    samples: list[tuple[float, int]] = []
    await asyncio.gather(watch(server.pid, soak, samples), *map(soak.client, range(CLIENTS)))
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for _ in range(500):
            if (await http.get("/load")).json()["server_load"] == 0:
                break
            await asyncio.sleep(0.02)
        else:
            soak.problems.append("requests are left in work")
        body = {"prompt": SNIPPETS[0], "max_tokens": LONGEST, "temperature": 0, "return_token_ids": True}
        body["ignore_eos"] = True
        last = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for _ in range(4)]
        while in_engine((await http.get("/metrics")).text) < 4:  # one that has only arrived may be refused
            await asyncio.sleep(0.005)
        server.send_signal(signal.SIGTERM)
        for answer in await asyncio.gather(*last):
            if answer.status_code != 200 or answer.json()["choices"][0]["token_ids"] != known[SNIPPETS[0]]:
                soak.problems.append(f"a request that SIGTERM found in work: {answer.text[:200]}")
    return {"seconds": seconds, "seed": seed, "counts": dict(soak.counts), "problems": soak.problems, "memory": samples}


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """By how much the last quarter's mean exceeds the second quarter's."""
    quarter = len(samples) // 4
    second, fourth = samples[quarter : 2 * quarter], samples[-quarter:]
    return sum(b for _, b in fourth) / quarter - sum(b for _, b in second) / quarter


def plot(samples: list[tuple[float, int]], allocated: list[tuple[float, float, int]], path: Path) -> None:
    """Draws the server's memory over time: what is resident, what malloc has given out, and the blocks of Python's objects."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, figsize=(7, 4.5), sharex=True)
    upper.plot([seconds / 60 for seconds, _ in samples], [size / 2**20 for _, size in samples], label="resident")
    minutes = [seconds / 60 for seconds, _, _ in allocated]
    upper.plot(minutes, [size for _, size, _ in allocated], label="in use, of malloc")
    upper.set_ylim(bottom=0)
    upper.set_ylabel("MiB")
    upper.legend(loc="lower right")
    lower.plot(minutes, [blocks / 1000 for _, _, blocks in allocated], color="C2")
    lower.set_ylim(bottom=0)
    lower.set_ylabel("Python's memory\nblocks, thousands")
    lower.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="draw the server's memory here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    known = references()
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        report = asyncio.run(run(server, url, known, options.seconds, options.seed))
        left = json.loads(server.stdout.readline())
        report |= {"allocated": left.pop("allocated"), "left": left, "exit": server.wait(60)}
    finally:
        server.kill()
        server.wait()
    problems: list[str] = report["problems"]
    if left["rows"] or left["blocks"] or left["unfinished"]:
        problems.append(f"left behind: {left}")
    if report["exit"] != 0:
        problems.append(f"the server ended with {report['exit']}")
    needed = ("greedy", "sampled", "sampled streams", "vanished", "cancelled", "invalid", "garbage")
    problems += [f"not a single one: {name}" for name in needed if not report["counts"].get(name)]
    if not left["faults"]["flaky"] or not left["preemptions"] or not report["counts"].get("503 queue_full"):
        problems.append("the load was too light: no fault, preemption or overflow")
    if len(report["memory"]) >= 40:
        report["growth"] = growth(report["memory"])
        if report["growth"] > 8 * 2**20:
            problems.append(f"memory grew by {report['growth'] / 2**20:.1f} MiB")
    for name, column in (("malloc", 1), ("objects", 2)):
        values = [(each[0], each[column]) for each in report["allocated"]]
        if len(values) >= 40:
            report[f"growth of {name}"] = growth(values)
    if options.json is not None:
        options.json.write_text(json.dumps(report))
    if options.plot is not None:
        plot(report["memory"], report["allocated"], options.plot)
    print(
        json.dumps(
            {name: value for name, value in report.items() if name not in ("memory", "problems", "allocated")}, indent=1
        )
    )
    for problem in problems[:20]:
        print("PROBLEM:", problem)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
