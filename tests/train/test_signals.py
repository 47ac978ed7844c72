import signal
import subprocess
import sys
import time

import pytest
from helpers.training_runs import Process, equal, latest, settings

from cvt.train.checkpointing import newest_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def words(folder):
    """A run of two epochs of twelve steps."""
    return settings(folder / "data")


def newest(run):
    return newest_checkpoint(run / "checkpoints")[1]


@pytest.fixture(scope="module")
def whole(folder, words):
    """The same run, not stopped."""
    process = Process([*words, "--output", str(folder / "whole")], folder / "whole.log")
    assert process.exit_code() == 0
    return newest(folder / "whole")


def slow_evaluation():
    from cvt.train import evaluation

    def evaluate(*arguments, **options):
        print("evaluating", flush=True)
        time.sleep(0.5)
        return quick(*arguments, **options)

    quick, evaluation.evaluate = evaluation.evaluate, evaluate


def slow_saves():
    from cvt.train import checkpointing

    def sync(path):
        print("saving", flush=True)
        time.sleep(0.5)
        return quick(path)

    quick, checkpointing.sync = checkpointing.sync, sync


@pytest.mark.parametrize(
    ("number", "workers", "before", "moment", "step"),
    [
        (signal.SIGTERM, 0, None, "  4/12", 4),
        (signal.SIGINT, 2, None, "  4/12", 4),
        (signal.SIGTERM, 2, slow_evaluation, "evaluating", 12),
        (signal.SIGTERM, 0, slow_saves, "saving", 0),
    ],
    ids=["in training", "Ctrl-C", "in evaluation", "in the first save"],
)
def test_a_signal_saves_within_a_step_and_the_run_goes_on_as_if_there_had_been_none(
    folder, words, whole, number, workers, before, moment, step
):
    output = folder / f"stopped{moment.strip()[:4]}{workers}"
    words = [*words, f"workers={workers}", "--output", str(output)]
    process = Process(words, folder / f"{output.name}.log", before)
    process.wait_for(moment).send(number, to_group=True)  # as Ctrl-C in a terminal does
    assert process.exit_code() == 128 + number
    done = newest(output)["step"]
    assert step <= done <= step + 2
    assert f"stopped and saved after {done} steps; --resume continues" in process.printed

    resumed = Process(["--resume", "--output", str(output)], folder / f"{output.name}.log")
    assert resumed.exit_code() == 0
    assert f"resuming from {output}/checkpoints/step-{done:08d}" in resumed.printed
    equal(newest(output) | {"recipe": None}, whole | {"recipe": None})  # workers differ


def test_a_step_of_several_batches_is_finished_first(folder, words):
    output = folder / "accumulating"
    words = [*words, "accumulate=4", "--output", str(output)]
    process = Process(words, folder / "accumulating.log", slow_second_batch)
    process.wait_for("second batch").send(signal.SIGTERM)
    assert process.exit_code() == 143
    assert newest(output)["step"] == 1


def slow_second_batch():
    from cvt.train import step

    def seed(*numbers):
        if numbers[1:] == (1,):
            print("second batch", flush=True)
            time.sleep(0.5)
        quick(*numbers)

    quick, step.seed_all = step.seed_all, seed


def stuck(module):
    def read(source, **limits):
        if source.name in ("train-red-03.png", "val-red-02.png"):
            print("stuck", flush=True)
            time.sleep(1000)
        return decode(source, **limits)

    decode, module.decode, module.POLL_SECONDS = module.decode, read, 0.2


def stuck_training_worker():
    from cvt.train import loader

    stuck(loader)


def stuck_validation_worker():
    from cvt.inference import predict

    stuck(predict)


@pytest.mark.parametrize("patch", [stuck_training_worker, stuck_validation_worker])
def test_a_signal_is_heard_while_a_worker_is_stuck(folder, words, whole, patch):
    output = folder / patch.__name__
    words = [*words, "workers=2", "--output", str(output)]
    process = Process(words, folder / f"{output.name}.log", patch)
    process.wait_for("stuck").send(signal.SIGTERM)
    assert process.exit_code() == 143
    assert f"stopped and saved after {newest(output)['step']} steps" in process.printed
    resumed = Process(["--resume", "--output", str(output)], folder / f"{output.name}.log")
    assert resumed.exit_code() == 0
    equal(newest(output) | {"recipe": None}, whole | {"recipe": None})  # workers differ


@pytest.mark.parametrize(
    ("number", "is_saved"), [(signal.SIGTERM, True), (signal.SIGINT, False)], ids=["TERM", "INT"]
)
def test_a_second_ctrl_c_ends_the_run_at_once_and_a_second_sigterm_lets_it_save(
    folder, words, number, is_saved
):
    output = folder / f"twice{number}"
    words = [*words, "save_steps=2", "--output", str(output)]
    process = Process(words, folder / f"{output.name}.log", slow_saves)
    process.wait_for("saving", times=3).send(number)
    time.sleep(0.1)
    assert process.send(number).exit_code() in (128 + number, -number)
    assert ("stopped and saved" in process.printed) == is_saved
    assert (newest(output)["step"] > 2) == is_saved


def test_python_m_cvt_exits_with_143(folder, words):
    output, log = folder / "command", folder / "command.log"
    words = latest([*words, "epochs=1000", "save_steps=5"])
    command = [sys.executable, "-m", "cvt", "train", *words]
    with open(log, "w") as file:
        process = subprocess.Popen([*command, "--output", output], stdout=file, stderr=file)
    try:
        while not (output / "checkpoints/step-00000005").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert f"stopped and saved after {newest(output)['step']} steps" in log.read_text()
