"""Training runs in processes of their own, to be watched, stopped and killed."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

# Children of a server that has imported everything: they begin at once.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        *("__main__", "cvt.cli.train", "cvt.cli.progress"),
        *("cvt.train.trainer", "torch.utils.tensorboard"),
    ]
)
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


def write_pictures(folder, train=16, val=7):
    """An image folder of three classes, with so many images of each to train and to test on."""
    generator = np.random.default_rng(0)
    for half, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (folder / half / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 60, (20, 20, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / half / name / f"{half}-{name}-{i:02d}.png")
    return folder


def settings(folder, **changes):
    """The words of a small run on the pictures, with everything random in play."""
    from cvt import CvtConfig

    if not folder.exists():
        write_pictures(folder / "pictures")
        config = CvtConfig(
            embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2], drop_rate=[0.1] * 3,
            drop_path_rate=[0.0, 0.0, 0.3],
        )  # fmt: skip
        config.save_pretrained(folder / "config")
    chosen = {
        "data": folder / "pictures", "model": folder / "config", "image_size": 16, "batch_size": 4,
        "epochs": 2, "lr": 2e-3, "mixup": 0.8, "ema_decay": 0.9,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in (chosen | changes).items()]


def without_pictures(set_attribute):
    """Let runs draw no pictures, which takes longer than all the rest, by a kind of `setattr`."""
    from cvt.train import run_folder

    set_attribute(run_folder, "write_pictures", lambda *_: None)
    set_attribute(run_folder, "plot_curves", lambda _, path, metric: path.touch())


def latest(words):
    """The words, of several with the same key the last."""
    return list({word.partition("=")[0]: word for word in words}.values())


class Process:
    """`cvt train` in a process, the head of its own group, that tells of every step.

    Attributes:
        log: the file of all that it prints.
        process: the process.
    """

    def __init__(self, words, log, before=None, environment=None):
        self.log = Path(log)
        self.process = forks.Process(target=_train, args=(words, log, before, environment or {}))
        self.process.start()

    @property
    def printed(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text, times=1, seconds=60):
        """Until it has printed the text so many times."""
        end = time.monotonic() + seconds
        while self.printed.count(text) < times:
            assert self.process.is_alive(), self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.002)
        return self

    def send(self, number, to_group=False):
        (os.killpg if to_group else os.kill)(self.process.pid, number)
        return self

    def exit_code(self, seconds=60):
        """Wait for it to end; negative: the signal that ended it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.printed}")
        return self.process.exitcode


def _train(words, log, before, environment):
    import torch

    from cvt.__main__ import main
    from cvt.cli.progress import TrainingBars

    multiprocessing.set_start_method("fork", force=True)  # of workers, as without the server
    os.setsid()
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    TrainingBars.EVERY = -1
    without_pictures(setattr)
    if before is not None:
        before()
    sys.argv = ["cvt", "train", *latest(words)]
    main()


def ranks(world, words, log, before=None):
    """One process per rank, as `torchrun` would start them; rank r prints to `log`.r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": port}
    environments = [
        shared | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world)
    ]
    return [Process(words, f"{log}.{own['RANK']}", before, own) for own in environments]


def equal(one, other, at=""):
    """Assert that two states are the same, bit for bit."""
    import torch

    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            equal(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for i, pair in enumerate(zip(one, other, strict=True)):
            equal(*pair, f"{at}/{i}")
    else:
        assert one == other, at


# ------------------------------------------------------------------------------------- kill -9


def _save_endlessly(folder, step, keep, sender):
    from cvt.train.checkpointing import save_checkpoint

    while True:
        step += 1
        save_checkpoint(folder, step, _state(step), keep)
        sender.send(step)


def _state(step):
    import torch

    return {"step": step, "weights": torch.full((100_000,), step), "words": [str(step)] * 100}


def kill_during_saves(folder, kills, keep, seed, torn_at_least=0):
    """Kill a process that does nothing but save, at random moments; nothing finished may be lost.

    On a fast disk few kills meet a save: then up to ten times as many follow, until
    `torn_at_least` have left a torn checkpoint.

    Returns:
        How many kills left a torn checkpoint beside the whole ones, and how many saves were done.
    """
    from cvt.train.checkpointing import newest_checkpoint

    moments, torn, step = random.Random(seed), 0, 0
    for turn in range(10 * kills):
        if turn >= kills and torn >= torn_at_least:
            break
        receiver, sender = forks.Pipe(duplex=False)
        process = forks.Process(target=_save_endlessly, args=(folder, step, keep, sender))
        process.start()
        sender.close()
        step = receiver.recv()  # the first save is done, whatever was left from the kill before
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                step = receiver.recv()
        torn += any(folder.glob(".step-*"))
        path, state = newest_checkpoint(folder)
        assert state["step"] in (step, step + 1), f"{path} after {step} were saved"
        equal(state, _state(state["step"]))
        step = state["step"]
    return torn, step


def kill_until_done(words, output, kills, seed, at_most=3.0):
    """Start a run, kill it at random moments so many times, resume it, let it end at last.

    Returns:
        At how many different steps it was killed, and how often something was half written.
    """
    moments, torn, steps = random.Random(seed), 0, set()
    arguments = [*words, "--output", str(output)]
    for turn in range(kills):
        process = Process(arguments, f"{output}.{turn}.log")
        process.wait_for(" images/s  ")  # so that each gets at least a step further
        time.sleep(moments.uniform(0, at_most))
        with contextlib.suppress(ProcessLookupError):
            process.send(signal.SIGKILL)
        if process.exit_code() == 0:  # it was done before
            break
        newest = max(path.name for path in (output / "checkpoints").glob("step-*"))
        steps.add(newest)
        torn += any(output.rglob(".*"))
        arguments = ["--resume", "--output", str(output)]
    process = Process(arguments, f"{output}.log")
    assert process.exit_code() == 0, process.printed
    return len(steps), torn
