"""How the sequences of requests leave the engine, and how the forks of one begin."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specplug.engine.commit import StepOutputs
from specplug.engine.scheduler import Scheduler
from specplug.model.kv_cache import KVCache
from specplug.model.runner import ModelRunner
from specplug.request import Request
from specplug.speculation.chain import SpeculatorChain


class Lifecycle:
    """Ends and forks the sequences of one engine.

    Args:
        scheduler: has all of them.
        outputs: what they are still to deliver.
        chain: the speculators.
        runner: the target.
        shared_caches: the KV caches that use the target's block tables, the target's own included.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        outputs: StepOutputs,
        chain: SpeculatorChain,
        runner: ModelRunner,
        shared_caches: Sequence[KVCache],
    ) -> None:
        self._scheduler = scheduler
        self._outputs = outputs
        self._chain = chain
        self._runner = runner
        self._shared_caches = shared_caches

    def fork_children(self, parent: Request) -> None:
        """Starts the other completions of a prompt that has just been computed."""
        children, parent.fork_group = parent.fork_group, []
        for child in children:
            copies = self._scheduler.fork(parent, child) if parent.slot >= 0 else None
            if copies is None:
                self._scheduler.add(child)
                continue
            self._chain.fork(parent, child)
            self._runner.fork(parent.slot, child.slot)
            for cache in self._shared_caches:
                cache.move([source for source, _ in copies], [destination for _, destination in copies])

    def finish(self, request: Request) -> None:
        """Removes a finished request from the batch; sequences that would have been forked from it start by themselves."""
        for child in request.fork_group:
            self._scheduler.add(child)
        request.fork_group = []
        if request.error is not None:
            self._clear_kv(request)
        self._scheduler.finish(request, "finished" if request.error is None else "aborted")

    def abort(self, request_ids: Collection[str], error: str | None = None) -> list[Request]:
        """Ends all sequences of requests, for a reason if it is an error; returns those that were not finished."""
        self._outputs.deliver()
        ended = []
        for request in list(self._scheduler.requests()):
            if request.id not in request_ids:
                continue
            if not request.is_finished:
                request.error = error
                request.end("abort")
                self._outputs.drop(request)
                ended.append(request)
                if request.listener is not None:
                    request.listener.end(request)
            request.fork_group = []
            self._scheduler.finish(request, "aborted")
        return ended

    def _clear_kv(self, request: Request) -> None:
        """Clears and forgets the blocks that a failed request shares with no other.

        Masked entries are multiplied by zero, and NaN times zero is NaN: it may leave none behind.
        """
        if request.table is None:
            return
        allocator, size = self._scheduler.allocator, request.table.block_size
        own = [block for block in request.table.blocks if not allocator.is_shared(block)]
        allocator.forget(own)
        for cache in self._shared_caches:
            cache.clear([slot for block in own for slot in range(block * size, (block + 1) * size)])
