"""Batches of what is asked for one by one."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cvt.serving.batching import Batcher


class Recorder:
    """Doubles numbers; keeps the batches, and stops in each until it is let on."""

    def __init__(self, held=False):
        self.batches, self.threads = [], set()
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.held = held

    def __call__(self, numbers):
        self.batches.append(numbers)
        self.threads.add(threading.get_ident())
        self.started.release()
        if self.held:
            assert self.go.acquire(timeout=60)
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


def batcher(compute, max_batch=4, wait=0.0, thread=None, turn=None):
    thread = thread or ThreadPoolExecutor(1)
    return Batcher(compute, max_batch, wait, thread, turn or asyncio.Lock())


async def in_flight(recorder, *numbers, of):
    """Tasks of numbers, of which the first is being computed and the others wait."""
    tasks = [asyncio.create_task(of(numbers[0]))]
    assert await asyncio.to_thread(recorder.started.acquire, timeout=60)
    tasks += [asyncio.create_task(of(number)) for number in numbers[1:]]
    await asyncio.sleep(0)
    return tasks


def test_a_full_batch_does_not_wait_and_order_is_kept():
    recorder = Recorder()

    async def main():
        double = batcher(recorder, wait=3600)
        return await asyncio.wait_for(asyncio.gather(*map(double, range(8))), 60)

    assert asyncio.run(main()) == [2 * number for number in range(8)]
    assert recorder.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(recorder.threads) == 1


def test_what_is_not_enough_for_a_batch_waits_for_others_only_so_long():
    recorder = Recorder()

    async def main():
        double, loop = batcher(recorder, wait=0.1), asyncio.get_running_loop()
        begin = loop.time()
        first = asyncio.create_task(double(1))
        await asyncio.sleep(0.02)
        assert await asyncio.gather(first, double(2)) == [2, 4]
        return loop.time() - begin

    assert asyncio.run(main()) >= 0.09
    assert recorder.batches == [[1, 2]]


def test_what_comes_while_a_batch_is_computed_is_the_next_batch():
    recorder = Recorder(held=True)

    async def main():
        tasks = await in_flight(recorder, *range(6), of=batcher(recorder))
        for _ in range(3):
            recorder.go.release()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [0, 2, 4, 6, 8, 10]
    assert recorder.batches == [[0], [1, 2, 3, 4], [5]]


def test_an_error_is_that_of_its_batch_alone():
    recorder = Recorder(held=True)

    async def main():
        double = batcher(recorder, max_batch=2)
        tasks = await in_flight(recorder, 1, 2, 13, 3, of=double)
        for _ in range(4):
            recorder.go.release()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await double(4)

    answers, later = asyncio.run(main())
    assert (answers[0], answers[3], later) == (2, 6, 8)
    for error in answers[1:3]:
        with pytest.raises(ValueError, match="13"):
            raise error


def test_a_wrong_number_of_answers_is_an_error_and_hangs_nobody():
    async def main():
        double = batcher(lambda numbers: numbers[1:])
        return await asyncio.gather(double(1), double(2), return_exceptions=True)

    assert [type(error) for error in asyncio.run(main())] == [AssertionError] * 2


def test_what_nobody_waits_for_is_not_computed():
    recorder = Recorder(held=True)

    async def main():
        tasks = await in_flight(recorder, *range(4), of=batcher(recorder))
        for task in (tasks[0], tasks[2]):  # of which the first is being computed
            task.cancel()
        for _ in range(2):
            recorder.go.release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(main())
    assert answers[1::2] == [2, 6]
    assert [type(each) for each in answers[::2]] == [asyncio.CancelledError] * 2
    assert recorder.batches == [[0], [1, 3]]


def test_batchers_take_turns_and_gather_items_until_theirs():
    recorder = Recorder(held=True)

    async def main():
        how = {"thread": ThreadPoolExecutor(4), "turn": asyncio.Lock()}
        one, other = batcher(recorder, **how), batcher(recorder, **how)
        tasks = await in_flight(recorder, 1, of=one)
        tasks.append(asyncio.create_task(other(10)))
        await asyncio.sleep(0.05)  # it has waited for others long enough
        tasks.append(asyncio.create_task(other(20)))
        await asyncio.sleep(0.05)
        assert recorder.batches == [[1]]
        recorder.go.release()
        recorder.go.release()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [2, 20, 40]
    assert recorder.batches == [[1], [10, 20]]
