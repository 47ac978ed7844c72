"""Processes that prepare images ahead."""

import os
import signal
import time

import pytest

from cvt.data.workers import Interrupted, computed_ahead


def work(argument):
    if argument == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if argument == "stick":
        time.sleep(3600)
    if argument == "fail":
        raise ZeroDivisionError("so it is")
    return argument, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_from_other_processes(workers):
    results = list(computed_ahead(work, range(20), workers))
    assert [value for value, _ in results] == list(range(20))
    processes = {process for _, process in results}
    assert os.getpid() not in processes
    assert len(processes) <= workers


def test_no_argument_gives_no_result():
    assert list(computed_ahead(work, [], 2)) == []


def test_two_arguments_are_taken_ahead_for_each_worker():
    arguments = iter(range(100))
    results = computed_ahead(work, arguments, 2)
    assert next(results)[0] == 0
    assert next(arguments) == 5
    results.close()


def test_an_error_of_the_function_is_raised():
    results = computed_ahead(work, ["fine", "fail"], 1)
    assert next(results)[0] == "fine"
    with pytest.raises(ZeroDivisionError, match="so it is"):
        next(results)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_reported(workers):
    with pytest.raises(RuntimeError, match=r"exit code -9.*killed for memory"):
        list(computed_ahead(work, ["fine", "kill", "fine"], workers))


def test_a_stuck_worker_does_not_stop_an_interruption():
    answers = iter([False, True])
    results = computed_ahead(work, ["fine", "stick"], 1, lambda: next(answers))
    (_, process) = next(results)
    with pytest.raises(Interrupted):
        next(results)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_workers_end_with_the_consumer():
    results = computed_ahead(work, range(10), 2)
    (_, process) = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
