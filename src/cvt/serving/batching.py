"""Batches of what is asked for one by one."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Waiting(NamedTuple, Generic[Item, Answer]):
    item: Item
    answer: asyncio.Future[Answer]
    until: float  # when it has waited long enough for others


class Batcher(Generic[Item, Answer]):
    """Computes items in batches, as they come; one for each event loop.

    A batch starts when `max_batch` items wait, or the first has waited for `wait` seconds, and it
    is this batcher's turn; it takes what waits then. What nobody waits for any more is left out.

    Args:
        compute: gives as many answers as it gets items; called in `thread`.
        max_batch: items of a batch.
        wait: seconds that an item waits for others.
        thread: where batches are computed.
        turn: held while a batch is computed. Batchers that share it take turns, in order.

    Example:
        >>> import asyncio
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from cvt.serving.batching import Batcher
        >>> async def main():
        ...     double = Batcher(
        ...         lambda numbers: [(2 * n, len(numbers)) for n in numbers],
        ...         max_batch=2, wait=1, thread=ThreadPoolExecutor(1), turn=asyncio.Lock(),
        ...     )
        ...     return await asyncio.gather(*map(double, range(4)))
        >>> asyncio.run(main())
        [(0, 2), (2, 2), (4, 2), (6, 2)]
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], list[Answer]],
        max_batch: int,
        wait: float,
        thread: Executor,
        turn: asyncio.Lock,
    ) -> None:
        self.compute, self.max_batch, self.wait = compute, max_batch, wait
        self.thread, self.turn = thread, turn
        self.waiting: deque[_Waiting[Item, Answer]] = deque()
        self.is_full = asyncio.Event()  # enough wait for a batch
        self.worker: asyncio.Task | None = None

    async def __call__(self, item: Item) -> Answer:
        """The answer to an item.

        Raises:
            Exception: what `compute` raised for the batch.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self.waiting.append(_Waiting(item, answer, loop.time() + self.wait))
        if len(self.waiting) >= self.max_batch:
            self.is_full.set()
        if self.worker is None or self.worker.done():
            self.worker = loop.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        """Compute batches until nothing waits."""
        while self.waiting:
            if len(self.waiting) < self.max_batch:
                self.is_full.clear()
                await _reached(self.is_full, self.waiting[0].until)
            async with self.turn:
                count = min(len(self.waiting), self.max_batch)
                batch = [self.waiting.popleft() for _ in range(count)]
                await self._answer([each for each in batch if not each.answer.done()])

    async def _answer(self, batch: list[_Waiting[Item, Answer]]) -> None:
        if not batch:
            return
        items = [each.item for each in batch]
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self.thread, self.compute, items)
            if len(answers) != len(items):
                raise AssertionError(f"{len(answers)} answers to {len(items)} items")
        except Exception as error:
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        for each, answer in zip(batch, answers, strict=True):
            if not each.answer.done():
                each.answer.set_result(answer)


async def _reached(event: asyncio.Event, when: float) -> None:
    """Wait for an event, until a time of the loop's clock at the longest."""
    try:
        async with asyncio.timeout_at(when):
            await event.wait()
    except TimeoutError:
        pass
