"""The service on a local Ray: the answers of one process, also when a replica is killed."""

import io
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import httpx
import psutil
import pytest
import ray
import yaml
from PIL import Image
from ray import serve
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

import cvt
from cvt.serving.on_ray import application
from cvt.serving.ray_config import write_config
from cvt.serving.settings import Settings

THREADS = {"runtime": "torch", "threads": 1}


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory):
    """What `cvt serve --write-config` writes, as it is read."""
    folder = tmp_path_factory.mktemp("ray") / "config"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    settings = Settings(max_batch=4, timeout=60)
    write_config(folder, [f"tiny={model_folder}"], settings, address, THREADS)
    return yaml.safe_load((folder / "serve.yaml").read_text()), folder


@pytest.fixture(scope="module")
def address(config):
    """The address of a service with one replica."""
    read, _ = config
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options=read["http_options"])
    (found,) = read["applications"]
    serve.run(application(found["args"]), name="cvt", route_prefix="/")
    yield "http://{host}:{port}".format(**read["http_options"])
    serve.shutdown()
    ray.shutdown()


def picture(seed):
    file = io.BytesIO()
    Image.effect_mandelbrot((48 + seed, 40), (-2, -1, 1, 1), 10 + seed).convert("RGB").save(
        file, "PNG"
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    """Pictures as PNG."""
    return [picture(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def expected(model_folder, pictures):
    """The two best classes of each."""
    return cvt.Classifier(model_folder, **THREADS)(pictures, top_k=2)


def equal(found, expected):
    return [each["label"] for each in found] == [each["label"] for each in expected] and all(
        each["score"] == pytest.approx(other["score"], abs=1e-6)
        for each, other in zip(found, expected, strict=True)
    )


def test_the_configuration_is_that_of_ray_and_of_its_operator(config):
    read, folder = config
    ServeDeploySchema.model_validate(read)
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    inside = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(inside)
    assert inside["http_options"]["host"] == "0.0.0.0"
    own, theirs = (each["applications"][0] for each in (read, inside))
    assert own["args"]["settings"].pop("loopback") is not theirs["args"]["settings"].pop("loopback")
    assert own == theirs
    with pytest.raises(FileExistsError, match="config exists already"):
        write_config(folder, ["cvt-13"], Settings(), ("127.0.0.1", 1), {})
    (deployment,) = own["deployments"]
    if "backpressure_config" in DeploymentSchema.model_fields:  # from Ray 2.58 on
        assert deployment["backpressure_config"] == {"retry_after_s": 1}
    for name in ("cvt-31", "runs/typo/best"):
        with pytest.raises(FileNotFoundError, match=name):
            write_config(folder / "new", [name], Settings(), ("127.0.0.1", 1), {})


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0"])
def test_the_pods_of_replicas_have_the_gpus_that_replicas_ask_for(model_folder, tmp_path, device):
    how = {"device": device, "api_key_file": "/keys/key"}
    models = [f"tiny={model_folder}"]
    write_config(tmp_path / "config", models, Settings(), ("127.0.0.1", 8000), how)
    text = (tmp_path / "config" / "rayservice.yaml").read_text()
    assert "api_key_file" in text.partition("apiVersion")[0]
    spec = yaml.safe_load(text)["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    asked = application["deployments"][0]["ray_actor_options"].get("num_gpus", 0)
    assert asked == (device != "cpu")
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    for resources in container["resources"].values():
        assert int(resources.get("nvidia.com/gpu", 0)) == asked


def test_a_replica_answers_as_one_process_does(address, pictures, expected):
    with httpx.Client(base_url=address, timeout=60) as client:
        files = [("images", each) for each in (*pictures, b"no picture")]
        answer = client.post("/v1/predict", params={"top_k": 2}, files=files)
        *found, bad = answer.json()["results"]
        assert all(map(equal, [each["predictions"] for each in found], expected))
        assert bad["status"] == 415
        assert client.post("/v1/predict", content=b"no").status_code == 415
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["name"], model["runtime"]["name"]) == ("tiny", "torch")
        assert "cvt_batch_images" in client.get("/metrics").text
    connection = HTTPConnection(address.partition("//")[2], timeout=60)
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", str(2**31))
    connection.endheaders()
    assert connection.getresponse().status == 413


def replicas():
    """The processes of the replicas."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if each.name().startswith("ray::ServeRepl")]


@pytest.mark.slow
def test_of_a_killed_replica_no_request_hangs_and_none_is_answered_wrong(
    address, pictures, expected
):
    stop, statuses, wrong = threading.Event(), [], []

    def ask(i):
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                number = i % len(pictures)
                answer = client.post("/v1/predict", params={"top_k": 2}, content=pictures[number])
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    (result,) = answer.json()["results"]
                    if not equal(result["predictions"], expected[number]):
                        wrong.append(result)
                i += 1

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, i) for i in range(8)]
        while len(statuses) < 50:
            time.sleep(0.1)
        (replica,) = replicas()
        os.kill(replica.pid, signal.SIGKILL)
        before = len(statuses)
        end = time.monotonic() + 120
        while time.monotonic() < end and statuses[before:].count(200) < 50:
            time.sleep(0.1)
        stop.set()
        for each in asked:
            each.result(timeout=90)  # none hangs
    assert not wrong
    assert set(statuses) <= {200, 500, 503}
    assert statuses[before:].count(200) >= 50
