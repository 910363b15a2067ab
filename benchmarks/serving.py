"""Throughput through HTTP next to the offline engine's, and time to first token of short requests under long prompts.

    python benchmarks/serving.py TARGET --streams 1 16 64 --json build/serving.json

The server is `specplug serve`, the offline engine is `LLM.generate` in a process of its own; both have the same options and
are idle while the other is measured. Rounds alternate, so that what else the machine does meets both alike; a ratio is of one
round, and the median of the rounds is shown. Requests are greedy completions of a fixed length. The client is a bare socket
that reads server-sent events, on the same cores. `--method ngram` measures with drafts. Processor time per token of either
process and of the client is shown too: other load on the machine does not count in it. With `--threads` of 1, engine and
event loop have a core each; with as many as there are cores they compete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SNIPPETS = (
    "import os\n\n\ndef main(",
    "class Node:\n    def __init__(self, value):\n",
    "for i in range(10):\n    print(i)\n",
)
ROWS = 64


def prompts(count: int) -> list[str]:
    """Prompts that differ, so that rows do not do the same."""
    return [f"# file {number}\n{SNIPPETS[number % len(SNIPPETS)]}" for number in range(count)]


def offline(target: str, options: dict[str, Any], tokens: int) -> None:
    """Generates once for every line of standard input (the number of rows), and answers with the seconds that took."""
    from specplug import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with LLM(target, max_num_seqs=ROWS, **options) as llm:
        print("ready", flush=True)
        for line in sys.stdin:
            texts = prompts(int(line))
            started = time.perf_counter()
            llm.generate(texts, params, use_tqdm=False)
            print(time.perf_counter() - started, flush=True)


async def post(port: int, body: dict[str, Any]) -> tuple[float, int]:
    """Sends a request; seconds to the first event, and the events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    received, first = b"", 0.0
    while part := await reader.read(1 << 16):
        received += part
        if not first and (b"data: " in received or b"choices" in received):
            first = time.perf_counter() - started
    writer.close()
    assert b" 200 OK" in received[:20], received[:500]
    assert not body.get("stream") or b"data: [DONE]" in received
    return first, received.count(b"data: ")


async def burst(port: int, count: int, tokens: int, *, stream: bool) -> float:
    """Seconds for so many requests at once."""
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    started = time.perf_counter()
    await asyncio.gather(*(post(port, {**body, "prompt": text}) for text in prompts(count)))
    return time.perf_counter() - started


async def first_tokens(port: int, long: int, shorts: int) -> list[float]:
    """Seconds to the first token of short requests, while prompts of `long` tokens are computed one after the other."""
    text = SNIPPETS[1] * (long // 12)
    stop = asyncio.Event()

    async def load(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            body = {"prompt": f"# {number} {turn}\n{text}", "max_tokens": 16, "ignore_eos": True, "stream": True}
            await post(port, body)

    loaders = [asyncio.ensure_future(load(number)) for number in range(8)]
    await asyncio.sleep(0.5)
    found = []
    for _ in range(shorts):
        body = {"prompt": "import os", "max_tokens": 4, "ignore_eos": True, "stream": True}
        found.append((await post(port, body))[0])
        await asyncio.sleep(0.05)
    stop.set()
    await asyncio.gather(*loaders)
    return found


def processor_seconds(pid: int) -> float:
    """Processor time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_port(server: subprocess.Popen[str]) -> int:
    """The port of a server once it serves."""
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("Serving"):
            return int(line.split(";")[0].rsplit(":", 1)[1])
    raise SystemExit("the server did not start:\n" + "".join(lines))


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--threads", type=int, help="of either engine")
    parser.add_argument("--method", help="a method of speculation, with 4 draft tokens")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--first-tokens", type=int, default=0, metavar="N", help="so many short requests under long prompts"
    )
    parser.add_argument("--long", type=int, default=1000, help="tokens of the long prompts, about")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--offline", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.offline:
        offline(options.target, json.loads(options.offline), options.tokens)
        return
    engine: dict[str, Any] = {"memory": options.memory, "compile": options.compile}
    command = [sys.executable, "-m", "specplug", "serve", options.target, "--port", "0", "--max-num-seqs", str(ROWS)]
    command += ["--memory", options.memory, "--compile" if options.compile else "--no-compile"]
    if options.method:
        engine["speculative_config"] = {"method": options.method, "num_speculative_tokens": 4}
        command += ["--speculative-config", json.dumps(engine["speculative_config"])]
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    server = start(command)
    words = [__file__, options.target, "--tokens", str(options.tokens), "--offline", json.dumps(engine)]
    worker = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = {"target": options.target, "tokens": options.tokens, "method": options.method, "rows": []}
    try:
        port = wait_for_port(server)
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"

        def generate(count: int) -> float:
            worker.stdin.write(f"{count}\n")
            worker.stdin.flush()
            return float(worker.stdout.readline())

        for count in options.streams:
            seconds: dict[str, list[float]] = {"offline": [], "streams": [], "whole": []}
            used = dict.fromkeys((*seconds, "client"), 0.0)
            for turn in range(options.rounds + 1):
                for name in seconds if turn % 2 else reversed(list(seconds)):
                    pid = worker.pid if name == "offline" else server.pid
                    before, mine = processor_seconds(pid), time.process_time()
                    if name == "offline":
                        taken = generate(count)
                    else:
                        taken = asyncio.run(burst(port, count, options.tokens, stream=name == "streams"))
                    if turn:  # the first round warms up
                        seconds[name].append(taken)
                        used[name] += processor_seconds(pid) - before
                        used["client"] += time.process_time() - mine if name == "streams" else 0.0
            tokens = count * options.tokens
            row = {
                "streams": count,
                "offline_tokens_per_second": tokens / statistics.median(seconds["offline"]),
                "ratio_streams": statistics.median(
                    a / b for a, b in zip(seconds["offline"], seconds["streams"], strict=True)
                ),
                "ratio_whole": statistics.median(
                    a / b for a, b in zip(seconds["offline"], seconds["whole"], strict=True)
                ),
                "ratio_of_medians": {
                    name: statistics.median(seconds["offline"]) / statistics.median(seconds[name])
                    for name in ("streams", "whole")
                },
                "seconds": seconds,
                "processor_us_per_token": {k: 1e6 * v / tokens / options.rounds for k, v in used.items()},
            }
            report["rows"].append(row)
            print(
                f"{count:3} streams: offline {row['offline_tokens_per_second']:7.0f} tokens/s, "
                f"HTTP streams {row['ratio_streams']:.3f} (of medians {row['ratio_of_medians']['streams']:.3f}), "
                f"whole responses {row['ratio_whole']:.3f} ({row['ratio_of_medians']['whole']:.3f}); "
                + "processor time per token "
                + ", ".join(f"{name} {us:.0f} µs" for name, us in row["processor_us_per_token"].items()),
                flush=True,
            )
        if options.first_tokens:
            found = sorted(asyncio.run(first_tokens(port, options.long, options.first_tokens)))
            report["first_token_seconds"] = found
            named = {"median": found[len(found) // 2], "p95": found[int(len(found) * 0.95)], "longest": found[-1]}
            print("time to first token under long prompts: " + ", ".join(f"{k} {v:.3f} s" for k, v in named.items()))
    finally:
        for process in (server, worker):
            process.terminate()
            process.wait(60)
    if options.json is not None:
        options.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
