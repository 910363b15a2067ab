"""The step-level engine: add requests at any time, run steps, see what each step committed.

python examples/step_loop.py
"""

from __future__ import annotations

from specplug import LLM, SamplingParams


def main() -> None:
    """Adds a second request while the first one runs."""
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM("tiny", skip_tokenizer_init=True, speculative_config={"method": "ngram"}) as llm:
        engine = llm.engine
        engine.add_request("first", [5, 6, 7, 5, 6, 7], params)
        steps = 0
        while engine.has_unfinished_requests:
            steps += 1
            if steps == 3:
                engine.add_request("second", [9, 8, 9, 8], params)
            for output in engine.step():
                print(steps, output.request.id, output.new_tokens, output.sources)


if __name__ == "__main__":
    main()
