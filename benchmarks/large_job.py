"""Is each picture of a large job labelled once, if a worker is killed and the job is stopped?

    python benchmarks/large_job.py                      # 10^6 rows: about half an hour
    python benchmarks/large_job.py --rows 100000
    python benchmarks/large_job.py --quick              # 2,000 rows

The job is that of `docs/en/scale.md`: parquet files of encoded pictures (scikit-learn's digits as
PNG, a number each) through `map_batches` of Ray Data on a local Ray, with two workers that run a
tiny model, into a folder of parquet files. Ray Data keeps which rows are written
(`CheckpointConfig`). What happens to it:

1. With a sixth of the rows written, one of the workers gets SIGKILL; Ray starts another.
2. With a third written, the job and its Ray get SIGKILL, as by a power cut.
3. The same job is started again, and runs to its end.

Then every number is counted in the results, and the labels, with `--embed` the features too, are
compared with those of one call of `cvt.Classifier` for each digit. The memory of the workers is
read every second from the first results on; the table has its median in the first and in the last
fifth of the time.

Prints a table and writes it to `results/large-job-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.compute as pc
from common import Row, command_line, count, result_file, show, write_rows
from PIL import Image
from pyarrow import dataset, parquet

import cvt
from cvt.inference.benchmark import device_name, versions

FILES = 20  # of pictures
GROUP = 1000  # rows of a row group
BLOCKS = 40  # of a small job: each is computed by one worker and written at its end
BLOCK_ROWS = 2500  # of a large one: if few blocks fit its store, Ray 2.60 writes only at the end
ROW = 400  # bytes, about, of a picture in a block
DIGITS = 1797  # of the data set
SIZE = 16  # pixels of a side that the model takes
JOB = """
import json, os, sys
import ray
from ray.data.checkpoint import CheckpointConfig
import cvt

folder, output, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
ray.init(num_cpus=6, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
context = ray.data.DataContext.get_current()
context.target_max_block_size = int(sys.argv[5])
context.checkpoint_config = CheckpointConfig(
    id_column="number", checkpoint_path=f"{folder}/done", delete_checkpoint_on_success=False
)
rows = ray.data.read_parquet(f"{folder}/pictures").map_batches(
    cvt.Classifier,
    fn_constructor_args=(f"{folder}/model", "openvino"),
    fn_constructor_kwargs={"threads": 1} | json.loads(sys.argv[4]),
    compute=ray.data.ActorPoolStrategy(size=2),
    batch_size=batch_size,
    max_restarts=-1,
    max_task_retries=-1,
)
rows.drop_columns(["image"]).write_parquet(output)
"""


def write_inputs(folder: Path, rows: int) -> None:
    """Parquet files of digits, each with its number, and a model."""
    from sklearn.datasets import load_digits

    contents = []
    for pixels in load_digits().images:
        file = io.BytesIO()
        Image.fromarray((pixels * 15).astype("uint8")).convert("RGB").save(file, "PNG")
        contents.append(file.getvalue())
    (folder / "pictures").mkdir()
    for i, numbers in enumerate(np.array_split(np.arange(rows), FILES)):
        images = [
            {"bytes": contents[number % len(contents)], "path": None} for number in numbers.tolist()
        ]
        table = pyarrow.table({"number": numbers, "image": images})
        parquet.write_table(table, folder / f"pictures/{i:03d}.parquet", row_group_size=GROUP)
    config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
    model = cvt.CvtForImageClassification(config)
    model.classifier.weight.data *= 50  # random weights, whose answers differ from digit to digit
    model.save_pretrained(folder / "model")
    cvt.image_processor(config, SIZE).save_pretrained(folder / "model")


# ------------------------------------------------------------------------------ processes


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen:
    """The job, in a session of its own."""
    arguments = (str(folder), str(folder / "labels"), str(options.batch_size))
    kind = {"features": True} if options.embed else {}
    block = min(options.rows // BLOCKS, BLOCK_ROWS) * ROW
    return subprocess.Popen(
        [sys.executable, "-c", JOB, *arguments, json.dumps(kind), str(block)],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("ab"),
        start_new_session=True,
    )


def workers(job: subprocess.Popen) -> dict[int, int]:
    """The processes that run the model, with their memory in MiB."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("ray::MapWorker"):
                    found[process.pid] = process.memory_info().rss // 2**20
    return found


def kill_all(job: subprocess.Popen) -> None:
    """End the job and all processes of its Ray at once."""
    for process in (*psutil.Process(job.pid).children(recursive=True), job):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


def rows_in(folder: Path) -> int:
    """Rows of the parquet files that are whole."""
    found = 0
    for path in folder.glob("*.parquet"):
        try:
            found += parquet.read_metadata(path).num_rows
        except (OSError, pyarrow.ArrowInvalid):
            continue  # is being written
    return found


def watch(job: subprocess.Popen, folder: Path, until: float) -> Iterator[dict[int, int]]:
    """The workers and their memory every second, until so many rows are written or it ends."""
    while job.poll() is None and rows_in(folder / "labels") < until:
        yield workers(job)
        time.sleep(1)


# ------------------------------------------------------------------------------ the job


def run_job(folder: Path, options: argparse.Namespace) -> Row:
    """Run, kill, run again; returns what happened."""
    memory: list[int] = []
    begin = time.perf_counter()
    job = start(folder, options)
    for _ in watch(job, folder, 1):
        pass  # until the workers have all they need in memory
    for found in watch(job, folder, options.rows / 6):
        memory += found.values()
    victim = next(iter(workers(job)))
    os.kill(victim, signal.SIGKILL)
    for found in watch(job, folder, options.rows / 3):
        memory += found.values()
    if job.poll() is not None:
        sys.exit(f"the job ended by itself: {(folder / 'stderr').read_text()[-2000:]}")
    kill_all(job)
    before = rows_in(folder / "labels")
    job = start(folder, options)
    for found in watch(job, folder, float("inf")):
        memory += found.values()
    seconds = time.perf_counter() - begin
    if job.returncode:
        sys.exit(f"the second job failed: {(folder / 'stderr').read_text()[-2000:]}")
    return checked(folder, options) | {
        "rows before the stop": before,
        "seconds": round(seconds),
        "rows per second": round(options.rows / seconds),
        "worker MiB, early": early(memory),
        "worker MiB, late": early(memory[::-1]),
    }


def early(memory: list[int]) -> int:
    """The median of the first fifth."""
    return int(np.median(memory[: max(1, len(memory) // 5)]))


def checked(folder: Path, options: argparse.Namespace) -> Row:
    """How often the rows are in the results, and how many differ from `cvt.Classifier`'s."""
    table = dataset.dataset(folder / "labels").to_table()
    numbers = table["number"].to_numpy()
    times = np.bincount(numbers, minlength=options.rows)
    return {
        "rows": options.rows,
        "once": int((times == 1).sum()),
        "never": int((times == 0).sum()),
        "several times": int((times > 1).sum()),
        "other answers": differing(folder, table, options.embed),
        "errors": len(table) - table["error"].null_count,
    }


def differing(folder: Path, table: pyarrow.Table, embed: bool) -> int:
    """How many labels differ from those of single calls, and features by more than rounding."""
    classifier = cvt.Classifier(folder / "model", "openvino", threads=1, features=embed)
    first = dataset.dataset(folder / "pictures").head(DIGITS)["image"].to_pylist()
    pictures = [image["bytes"] for image in first]
    own = [classifier(picture, top_k=1)[0]["label"] for picture in pictures]
    expected = pyarrow.array(own).take(table["number"].to_numpy() % DIGITS)
    found = pc.sum(pc.not_equal(table["label"].combine_chunks(), expected)).as_py()
    if embed:
        features = classifier.embed(pictures)
        for batch in table.select(["number", "features"]).to_batches(max_chunksize=10_000):
            of_rows = batch["features"].flatten().to_numpy().reshape(len(batch), -1)
            near = np.isclose(of_rows, features[batch["number"].to_numpy() % DIGITS], atol=1e-4)
            found += int((~near.all(axis=1)).sum())
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=count, default=1_000_000)
    parser.add_argument("--batch-size", type=count, default=256)
    parser.add_argument("--embed", action="store_true", help="features in the place of labels")
    parser.add_argument("--quick", action="store_true", help="2,000 rows")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.batch_size = 2000, 50
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "large-job" + "-embed" * options.embed + "-quick" * options.quick
    path = result_file(options.results, name, "cpu", options.overwrite)
    with tempfile.TemporaryDirectory() as work:
        write_inputs(Path(work), options.rows)
        row = run_job(Path(work), options)
    show([row])
    about = {"device": device_name("cpu"), **versions(("torch", "pyarrow", "cvt"))}
    about["ray"] = metadata.version("ray")
    write_rows(path, [row | about], "w" if options.overwrite else "x")
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
