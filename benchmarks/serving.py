"""What does each way to serve a model cost, beside classifying the same files by `cvt predict`?

    pip install litserve                        # a peer, which the package does not need
    python benchmarks/serving.py                # about twenty minutes on two cores
    python benchmarks/serving.py --engines "cvt serve"
    python benchmarks/serving.py --quick        # a tiny model, few requests

Engines, each a process of its own on the loopback, one after the other: `cvt serve`; what its
`--write-config` writes, on a local Ray Serve, with one replica; LitServe around `cvt.Classifier`;
LitServe around transformers' CvT and image processor. All have the same shape and weights, batches
of up to 32, images waiting 5 ms for others, and as many threads as the machine has processors. Ours
run the runtime that `auto` takes for many images. LitServe takes pictures in base64, the others as
they are. The load is made by httpx in this process.

For each engine: seconds until it answers; the median of one client's requests, one after the other;
throughput with 32 clients, and its ratio to `Classifier.stream`, which is what `cvt predict` runs,
on the same files in the same run; the 50th and 99th percentile of requests that arrive at random
times at half that throughput, and the latter divided by the time of one; then a burst of 1,000
requests at once: how many were answered, rejected (503) and failed, and the memory of all
processes of the engine before it and 10 seconds after.

Prints a table and writes it to `results/serving-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import asyncio
import base64
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from common import (
    Row,
    command_line,
    count,
    in_fresh_process,
    result_file,
    show,
    some_of,
    transformers_cvt,
    write_pictures,
    write_rows,
)
from peers import shape

import cvt
from cvt.inference.benchmark import device_name, timed, versions
from cvt.runtime.factory import MANY_IMAGES, fastest
from cvt.serving.ray_config import write_config
from cvt.serving.settings import Settings

LIT = """
import base64, io, sys
import litserve
from PIL import Image
folder, port, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Api(litserve.LitAPI):
    def decode_request(self, request):
        return base64.b64decode(request["image"])

    def encode_response(self, output):
        return {"predictions": output}

class Own(Api):
    def setup(self, device):
        import cvt
        self.classifier = cvt.Classifier(folder, sys.argv[6], threads=threads, batch_size=batch)

    def predict(self, images):
        return self.classifier(images, top_k=5)

class Transformers(Api):
    def setup(self, device):
        import torch, transformers
        torch.set_num_threads(threads)
        self.pipeline = transformers.pipeline("image-classification", folder, use_fast=True)

    def predict(self, images):
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        return self.pipeline(opened, batch_size=batch, top_k=5)

if __name__ == "__main__":
    api = {"own": Own, "transformers": Transformers}[sys.argv[5]]
    server = litserve.LitServer(
        api(max_batch_size=batch, batch_timeout=0.005), accelerator="cpu", timeout=120
    )
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")
"""
ENGINES = {
    "cvt serve": [
        *("-m", "cvt", "serve", "{model}", "--port", "{port}", "--runtime", "{runtime}"),
        *("--threads", "{threads}", "--max-batch", "{batch}", "--timeout", "120"),
    ],
    "cvt on Ray Serve": ["-m", "ray.serve.scripts", "run", "{ray}/serve.yaml"],
    "LitServe: cvt": ["{lit}", "{model}", "{port}", "{threads}", "{batch}", "own", "{runtime}"],
    "LitServe: transformers": [
        *("{lit}", "{transformers}", "{port}", "{threads}", "{batch}", "transformers")
    ],
}
START_SECONDS = 240


@contextmanager
def engine(name: str, work: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """An engine that is started; its process and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "lit.py").write_text(LIT)
    places = {
        "model": work / "model",
        "transformers": work / "transformers",
        "lit": work / "lit.py",
        "ray": work / "ray",
        "port": port,
        "threads": options.threads,
        "batch": options.batch_size,
        "runtime": options.runtime,
    }
    settings = Settings(max_batch=options.batch_size, timeout=120)
    how = {"runtime": options.runtime, "threads": options.threads}
    address = "127.0.0.1", port
    write_config(work / "ray", [f"model={work / 'model'}"], settings, address, how, overwrite=True)
    words = [word.format(**places) for word in ENGINES[name]]
    of_ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, env=os.environ | of_ray, cwd=work
        )
    try:
        yield process.pid, port
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def memory(pid: int) -> float:
    """MiB that a process and those that it has started occupy, shared pages counted once."""
    found = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += process.memory_full_info().pss
    return found / 2**20


# ------------------------------------------------------------------------------ load


class Client:
    """What sends pictures to an engine.

    Args:
        name: of the engine.
        port: on the loopback.
        pictures: encoded.
    """

    def __init__(self, name: str, port: int, pictures: list[bytes]) -> None:
        self.pictures = pictures
        self.is_lit = name.startswith("LitServe")
        self.path = "/predict" if self.is_lit else "/v1/predict"
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=180, limits=limits
        )

    async def ask(self, number: int) -> tuple[int, float]:
        """Send one picture; the status of the answer (0 for none), and its seconds."""
        picture = self.pictures[number % len(self.pictures)]
        begin = time.perf_counter()
        try:
            if self.is_lit:
                encoded = base64.b64encode(picture).decode()
                answer = await self.http.post(self.path, json={"image": encoded})
            else:
                answer = await self.http.post(self.path, content=picture)
            status = answer.status_code
        except httpx.HTTPError:
            status = 0
        return status, time.perf_counter() - begin

    async def started(self) -> None:
        """Wait until it answers."""
        end = time.perf_counter() + START_SECONDS
        while (await self.ask(0))[0] != 200:
            if time.perf_counter() > end:
                sys.exit(f"{self.path}: no answer after {START_SECONDS} seconds")
            await asyncio.sleep(0.2)

    async def alone(self, count: int) -> float:
        """Seconds of one request, one after the other: the median."""
        return float(np.median([(await self.ask(i))[1] for i in range(count)]))

    async def together(self, clients: int, count: int) -> float:
        """Requests answered per second, with so many clients that ask again and again."""
        numbers = iter(range(count))

        async def work() -> int:
            return sum([(await self.ask(number))[0] == 200 for number in numbers])

        begin = time.perf_counter()
        answered = sum(await asyncio.gather(*(work() for _ in range(clients))))
        return answered / (time.perf_counter() - begin)

    async def arriving(self, rate: float, count: int) -> list[float]:
        """Seconds of requests that arrive at random times, so many per second."""
        draw, asked = random.Random(0), []
        for number in range(count):
            asked.append(asyncio.create_task(self.ask(number)))
            await asyncio.sleep(draw.expovariate(rate))
        return [seconds for status, seconds in await asyncio.gather(*asked) if status == 200]

    async def burst(self, count: int) -> Counter[int]:
        """The statuses of requests that are sent at once."""
        answers = await asyncio.gather(*(self.ask(number) for number in range(count)))
        return Counter(status for status, _ in answers)


async def measured(
    name: str, pid: int, port: int, files_rate: float, options: argparse.Namespace
) -> Row:
    """The row of an engine that was just started."""
    begin = time.perf_counter()
    client = Client(name, port, [path.read_bytes() for path in options.paths])
    await client.started()
    start = time.perf_counter() - begin
    await client.together(options.clients, options.requests // 4)  # warm
    one = await client.alone(options.requests // 10)
    rate = await client.together(options.clients, options.requests)
    seconds = await client.arriving(rate / 2, options.requests)
    p50, p99 = np.percentile(seconds, (50, 99))
    before = memory(pid)
    statuses = await client.burst(options.burst)
    print(f"{name}: {dict(statuses)} (statuses of the burst; 0 for no answer)", flush=True)
    await asyncio.sleep(min(10, options.burst / 100))
    after = memory(pid)
    await client.http.aclose()
    return {
        "engine": name,
        "start s": round(start, 1),
        "one ms": round(1000 * one, 1),
        "images/s": round(rate, 1),
        "times cvt predict": round(rate / files_rate, 2),
        "p50 ms": round(1000 * p50, 1),
        "p99 ms": round(1000 * p99, 1),
        "p99 / one": round(p99 / one, 1),
        "answered": statuses.pop(200, 0),
        "rejected (503)": statuses.pop(503, 0),
        "failed": statuses.total(),
        "MiB before": round(before),
        "MiB after": round(after),
    }


def rate_of_files(model: Path, folder: Path, runtime: str, threads: int) -> float:
    """Images of a folder per second by `Classifier.stream`, after a first pass."""
    classifier = cvt.Classifier(model, runtime, threads=threads)
    list(classifier.stream(folder))
    found = list(folder.iterdir())
    return len(found) / timed(lambda: list(classifier.stream(folder)))


def measure(options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """A row for each engine."""
    options.paths = write_pictures(work / "pictures", options.pictures, 640, 427, 90)
    config = shape(options.variant)
    model = cvt.CvtForImageClassification(config)
    model.save_pretrained(work / "model")
    processor = cvt.image_processor(config, options.image_size)
    peer = transformers_cvt(config)
    peer.load_state_dict({**peer.state_dict(), **model.state_dict()})
    peer.save_pretrained(work / "transformers")
    for name in ("model", "transformers"):
        processor.save_pretrained(work / name)
    pictures = (work / "model", work / "pictures", options.runtime, options.threads)
    files_rate = in_fresh_process(rate_of_files, *pictures)
    print(f"cvt predict: {files_rate:.1f} images/s", flush=True)
    for name in options.engines:
        with engine(name, work, options) as (pid, port):
            yield asyncio.run(measured(name, pid, port, files_rate, options))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--engines", type=some_of(ENGINES), default=list(ENGINES))
    parser.add_argument("--clients", type=count, default=32)
    parser.add_argument("--requests", type=count, default=400, help="of each measurement")
    parser.add_argument("--burst", type=count, default=1000, help="requests at once")
    parser.add_argument("--pictures", type=count, default=256)
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--variant", default="cvt-13")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--threads", type=count, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a tiny model, few requests")
    options = parser.parse_args(arguments)
    # What `cvt predict` takes for a large folder, and `cvt serve` always.
    options.runtime = fastest("cpu", "fp32", MANY_IMAGES)
    if options.quick:
        options.variant, options.image_size, options.requests = "tiny", 64, 40
        options.pictures, options.burst = 16, 50
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "serving-quick" if options.quick else "serving"
    path = result_file(options.results, name, "cpu", options.overwrite)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for row in measure(options, Path(work)):
            print(row["engine"], row["images/s"], "images/s", flush=True)
            rows.append(row)
    show(rows)
    about = {"device": device_name("cpu"), **versions(("torch", "transformers", "cvt"))}
    for library in ("litserve", "ray"):
        with suppress(metadata.PackageNotFoundError):
            about[library] = metadata.version(library)
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
