import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.training_runs import Process, equal, latest, ranks, settings

from cvt.checkpoints import load_classifier, load_processor
from cvt.data import open_training
from cvt.inference.evaluate import evaluate
from cvt.train.checkpointing import newest_checkpoint

CORRUPT = ("train/red/train-red-03.png", "val/blue/val-blue-05.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def words(folder):
    """A run of two epochs of six steps of eight images, tested on 21; two images are corrupt."""
    words = settings(folder / "data", ema_decay=0)
    for name in CORRUPT:
        (folder / "data/pictures" / name).write_bytes(b"no picture")
    return words


@pytest.fixture(scope="module")
def one(folder, words):
    """The run in one process."""
    process = Process([*words, "accumulate=2", "--output", str(folder / "one")], folder / "one.log")
    assert process.exit_code() == 0
    return folder / "one"


@pytest.fixture(scope="module", params=["", "fsdp=true"], ids=["ddp", "fsdp"])
def two(folder, words, request):
    """The run in two processes, and its words."""
    output = folder / f"two{request.param}"
    words = [*words, *filter(None, [request.param])]
    assert exit_codes(ranks(2, [*words, "--output", str(output)], output)) == [0, 0]
    return output, words


def exit_codes(processes):
    return [process.exit_code() for process in processes]


def state(run):
    return newest_checkpoint(run / "checkpoints")[1]


def losses(run):
    """The loss of every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("train/loss")]


def printed(output):
    return [Path(f"{output}.{rank}").read_text() for rank in (0, 1)]


# ------------------------------------------------------------------------------ as one process


def test_two_processes_learn_what_one_does(one, two):
    output, _ = two
    assert len(losses(one)) == 12
    assert losses(output) == pytest.approx(losses(one), rel=1e-4)
    weights, expected = state(output)["model"], state(one)["model"]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        if "running" not in name and "batches" not in name:  # of the first process's images only
            torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_every_test_image_is_counted_once_and_by_the_model_that_is_kept(folder, two):
    check_evaluation(folder, two[0], "val")


def check_evaluation(folder, output, prefix):
    _, images, _ = open_training(folder / "data/pictures")
    model = load_classifier(output / "best")
    found = evaluate(model, load_processor(output / "best", model.config), images, batch_size=4)
    assert (found.images, len(found.failures)) == (20, 1)
    with open(output / "results.csv") as file:
        row = max(csv.DictReader(file), key=lambda row: float(row[f"{prefix}_top1"]))
    assert float(row[f"{prefix}_top1"]) == found.top1
    assert float(row[f"{prefix}_loss"]) == pytest.approx(found.loss, rel=1e-6)


def test_averaged_weights_are_evaluated_as_they_are_kept(folder, words):
    output = folder / "ema"
    assert exit_codes(ranks(2, [*words, "ema_decay=0.5", "--output", str(output)], output)) == [
        0,
        0,
    ]
    check_evaluation(folder, output, "ema")


def test_weighted_classes_in_two_processes_out_of_time_end_as_in_one(folder, words):
    """After the first step the time is over, by the clock of one of them; they end together."""
    data = folder / "unbalanced"
    shutil.copytree(folder / "data/pictures", data)
    for file in sorted(data.glob("train/red/*.png"))[4:]:
        file.unlink()
    words = [*words, f"data={data}", "class_weights=balanced", "epochs=1"]
    alone = Process(
        [*words, "accumulate=2", "--output", str(folder / "weighted")], folder / "weighted.log"
    )
    assert alone.exit_code() == 0
    output = folder / "weighted-two"
    hours = ["max_hours=1e-9", "--output", str(output)]
    assert exit_codes(ranks(2, [*words, *hours], output)) == [0, 0]
    assert state(output)["step"] == 1
    assert "ended after 1 of 4 steps" in printed(output)[0]
    more = ["--resume", "max_hours=none", "--output", str(output)]
    assert exit_codes(ranks(2, more, output)) == [0, 0]
    assert state(output)["step"] == 4
    assert losses(output) == pytest.approx(losses(folder / "weighted"), rel=1e-4)


def test_warnings_are_printed_once(two):
    output, _ = two
    first, second = printed(output)
    for text in ("skipped:", "not counted:", "epoch   1 ", "best top-1"):
        assert first.count(text) == 1
        assert text not in second
    (line,) = (output / "corrupt.txt").read_text().splitlines()
    assert CORRUPT[0] in line


# ------------------------------------------------------------------------------ stopped, resumed


def test_a_run_in_two_processes_resumes_in_two_exactly_and_in_one(folder, one, two):
    whole, words = two
    output = folder / f"{whole.name}-stopped"
    processes = ranks(2, [*words, "--output", str(output)], output)
    processes[0].wait_for("  3/6")
    processes[1].send(signal.SIGTERM)  # one of them hears of it, both stop
    assert exit_codes(processes) == [143, 143]
    assert 0 < state(output)["step"] < 6
    alone = folder / f"{whole.name}-alone"
    shutil.copytree(output, alone)

    assert exit_codes(ranks(2, ["--resume", "--output", str(output)], output)) == [0, 0]
    equal(state(output), state(whole))
    assert losses(output) == losses(whole)
    equal(
        load_classifier(output / "best").state_dict(), load_classifier(whole / "best").state_dict()
    )

    process = Process(["--resume", "--output", str(alone)], folder / "alone.log")
    assert process.exit_code() == 0
    assert state(alone)["batches_per_step"] == 2
    assert state(alone)["recipe"]["accumulate"] == 1  # as the run was started
    assert losses(alone) == pytest.approx(losses(one), rel=1e-4)


def test_a_process_without_a_readable_image_does_not_keep_the_other_waiting(folder, words, one):
    data = folder / "unreadable"
    shutil.copytree(folder / "data/pictures", data)
    for file in sorted(data.glob("train/*/*.png"))[::2]:
        file.write_bytes(b"no picture")
    output = folder / "blank"
    words = [*words, f"data={data}", "batch_size=2", "epochs=1", "max_corrupt=1"]
    words += ["image_size=48", "mixup=0"]
    assert exit_codes(ranks(2, [*words, "--output", str(output)], output)) == [0, 0]
    found = state(output)
    assert len(found["corrupt"]) > 10
    assert all(weight.isfinite().all() for weight in found["model"].values())
    assert all(0.3 < loss < 3 for loss in losses(output))


def test_processes_that_cannot_share_the_batches_raise(folder, one):
    processes = ranks(3, ["--resume", "--output", str(one)], folder / "three")
    assert exit_codes(processes) == [1, 1, 1]
    assert "3 processes cannot share" in processes[0].printed


# ------------------------------------------------------------------------------ one of them fails


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_do_not_wait_for_a_killed_process(folder, words, killed):
    output = folder / f"killed{killed}"
    processes = ranks(2, [*words, "save_steps=2", "--output", str(output)], output)
    processes[0].wait_for("  3/6")
    processes[killed].send(signal.SIGKILL)
    assert processes[1 - killed].exit_code(seconds=35) == 1
    assert state(output)["step"] >= 2


def no_space_for_the_second_checkpoint():
    from cvt.train import trainer

    def save(folder, step, *rest):
        if step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return saved(folder, step, *rest)

    saved, trainer.save_checkpoint = trainer.save_checkpoint, save


def test_a_full_disk_ends_all_processes_and_is_reported_by_the_first(folder, words):
    output = folder / "full"
    processes = ranks(
        2, [*words, "save_steps=2", "--output", str(output)], output,
        no_space_for_the_second_checkpoint,
    )  # fmt: skip
    assert [process.exit_code(seconds=35) for process in processes] == [1, 1]
    error = processes[0].printed.splitlines()[-1]
    assert error.endswith("checkpoints/step-00000002 cannot be written: File too large")
    assert state(output)["step"] == 0


def test_torchrun_ends_a_run_of_which_a_process_is_killed(folder, words):
    output, log = folder / "torchrun", folder / "torchrun.log"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "cvt", "train", *latest([*words, "epochs=1000", "save_steps=2"]), "--output", output,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        torchrun = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        while not (output / "checkpoints/step-00000002").exists():
            assert torchrun.poll() is None, log.read_text()
            time.sleep(0.05)
        os.kill(process_of_rank(1, torchrun.pid), signal.SIGKILL)
        assert torchrun.wait(35) != 0
    finally:
        torchrun.kill()
        torchrun.wait()
    assert state(output)["step"] >= 2


def process_of_rank(rank, parent):
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    of_rank = f"RANK={rank}\0".encode()
    (found,) = (
        pid for pid in children if b"\0" + of_rank in Path(f"/proc/{pid}/environ").read_bytes()
    )
    return int(found)
