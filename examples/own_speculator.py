"""A speculator of your own in one file: it proposes what followed the last occurrence of the current token.

python examples/own_speculator.py
"""

from __future__ import annotations

from specplug import LLM, Proposal, ProposalBatch, SamplingParams, SpeculatorTraits, hookimpl


class LastSeen:
    """Stateless: a proposal depends on the row's tokens alone."""

    traits = SpeculatorTraits(token_only=True)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Returns one chain per row; an empty chain is always legal."""
        drafts = []
        for row in batch.rows:
            tokens = row.tokens[:]
            seen = [i for i, token in enumerate(tokens[:-1]) if token == tokens[-1]]
            start = seen[-1] + 1 if seen else len(tokens)
            drafts.append(tokens[start : start + row.budget.max_nodes])
        return Proposal(drafts)


def main() -> None:
    """Runs it and prints how many of its drafts were accepted."""
    plugins = {"last_seen": lambda config, target: LastSeen()}
    with LLM("tiny", plugins=plugins, speculative_config={"method": "last_seen"}) as llm:
        completion = llm.generate("x = [0, 0, 0, 0,", SamplingParams(temperature=0, max_tokens=32))[0].outputs[0]
        print(completion.text)
        print(completion.metrics.by_method)


if __name__ == "__main__":
    main()
