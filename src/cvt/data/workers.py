"""Processes that prepare images ahead, one of which may be stuck or killed."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any

POLL_SECONDS = 2.0  # between checks whether to keep waiting for a worker


class Interrupted(Exception):  # noqa: N818
    """The batch that is waited for is no longer wanted."""


def computed_ahead(
    function: Callable[[Any], Any],
    arguments: Iterable[Any],
    workers: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """The results of a function, in order, from processes that compute two each ahead.

    Args:
        function: what to compute; it is pickled where processes are not forked.
        arguments: its arguments, pickled for the processes; taken as results are.
        workers: the number of processes.
        interrupted: whether to give up while a worker is stuck.

    Raises:
        Interrupted: `interrupted` was true, and `POLL_SECONDS` passed without the next result.
        RuntimeError: a worker was killed.
        Exception: what the function raised.
    """
    # The processes start before the threads: what is forked beside a thread may find a lock taken.
    idle: SimpleQueue[Worker] = SimpleQueue()
    running = [Worker(function) for _ in range(workers)]
    for worker in running:
        idle.put(worker)

    def compute(argument: bytes) -> Any:
        worker = idle.get()
        try:
            return worker(argument)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(workers)
    pending: deque[Future] = deque()
    remaining = iter(arguments)

    def submit(count: int) -> None:
        for argument in islice(remaining, count):
            pending.append(pool.submit(compute, pickle.dumps(argument)))

    try:
        submit(2 * workers)
        while pending:
            result = _result(pending.popleft(), interrupted)
            submit(1)
            yield result
    finally:
        for worker in running:
            worker.kill()
        pool.shutdown(cancel_futures=True)


def _result(future: Future, interrupted: Callable[[], bool]) -> Any:
    """A result, when it is there."""
    while not wait_for([future], POLL_SECONDS).done:
        if interrupted():
            raise Interrupted
    return future.result()


class Worker:
    """A process that computes a function, for one thread at a time."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.connection, other = multiprocessing.Pipe()
        arguments = (other, function, os.getpid())
        self.process = multiprocessing.Process(target=_compute, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def __call__(self, argument: bytes) -> Any:
        """The result for a pickled argument; raises what the function raises."""
        try:
            self.connection.send_bytes(argument)
            if self.connection not in wait([self.connection, self.process.sentinel]):
                raise EOFError  # which no `recv` notices where another fork has the other end
            is_result, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(POLL_SECONDS)
            raise RuntimeError(
                f"a worker process ended (exit code {self.process.exitcode}) while it decoded "
                "images: it may have been killed for memory; fewer workers take less"
            ) from None
        if is_result:
            return result
        raise result

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join(POLL_SECONDS)
        with suppress(OSError, AttributeError):  # Windows has pipes of another kind
            other = socket.socket(socket.AF_UNIX, fileno=os.dup(self.connection.fileno()))
            with other:
                other.shutdown(socket.SHUT_RDWR)  # ends a `recv` of half a result


def _compute(connection: Connection, function: Callable[[Any], Any], parent: int) -> None:
    """In a worker: compute until the main process is gone."""
    answer_nothing()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which multiprocessing ends what is left
    with suppress(ConnectionError):
        while True:
            # Other workers may hold the other end of the pipe, which is not closed then.
            while not connection.poll(POLL_SECONDS):
                if os.getppid() != parent:
                    return
            try:
                answer = (True, function(pickle.loads(connection.recv_bytes())))
            except (EOFError, ConnectionError):
                return
            except Exception as error:
                answer = (False, error)
            connection.send(answer)


def answer_nothing(worker: int = 0) -> None:
    """In a worker: what ends a run, as Ctrl-C does, the main process answers alone.

    What is sent to the group does not reach the worker, and of a batch that the main process was
    fetching when it ended, multiprocessing's thread in the worker prints no traceback.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    sys.excepthook = _hook_but_for_lost_connections


def _hook_but_for_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
