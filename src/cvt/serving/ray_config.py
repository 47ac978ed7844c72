"""The configuration of a service on a cluster, for Ray Serve and for KubeRay."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from cvt.checkpoints.source import check_exists
from cvt.files import staged
from cvt.libraries import is_installed
from cvt.serving.server import named_models
from cvt.serving.settings import Settings

DEPLOYMENT = "cvt"
SERVE, KUBERAY = "serve.yaml", "rayservice.yaml"
THREADS = 2  # of a replica, unless they are given
HEADER = """\
# The service `cvt serve` on Ray Serve. On one machine, reachable from it alone:
#
#   export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=token
#   ray get-auth-token --generate
#   ray start --head --node-ip-address 127.0.0.1
#   serve deploy {name}
#
# Models are paths on every node, or names of the hub; api_key_file, if there is one, is a path on
# every node. `threads` and `num_cpus` go together.
"""
KUBERAY_HEADER = """\
# The same for KubeRay: kubectl apply -f {name}
# The image is built by the Dockerfile of cvt-vision with --build-arg EXTRAS=serve,export,ray.
# Models that are paths, and api_key_file, must be in the image or on a volume that is mounted at
# the same place.
"""


def serve_config(
    models: Mapping[str, str],
    settings: Settings,
    address: tuple[str, int] = ("127.0.0.1", 8000),
    how: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `serve deploy` takes.

    Args:
        models: by the names that requests give.
        settings: of each replica; without a key, which belongs into a file.
        address: host and port that the proxies listen on.
        how: further arguments of `cvt.serving.on_ray.application`; those that are None are left
            out.
    """
    given = {name: value for name, value in (how or {}).items() if value is not None}
    given = {"threads": THREADS} | given
    own = {field.name: getattr(settings, field.name) for field in fields(settings)}
    assert own.pop("api_key") is None
    resources = {"num_cpus": given["threads"]}
    if str(given.get("device", "")).startswith("cuda"):
        resources["num_gpus"] = 1
    deployment = {
        "name": DEPLOYMENT,
        "ray_actor_options": resources,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 4,
            "target_ongoing_requests": settings.max_batch,
        },
        "max_ongoing_requests": 2 * settings.max_batch,
        "max_queued_requests": settings.max_queue,
        **backpressure(),
    }
    application = {
        "name": DEPLOYMENT,
        "route_prefix": "/",
        "import_path": "cvt.serving.on_ray:application",
        "args": {"models": dict(models), **given, "settings": own},
        "deployments": [deployment],
    }
    host, port = address
    return {"http_options": {"host": host, "port": port}, "applications": [application]}


def backpressure() -> dict[str, Any]:
    """The setting that gives Ray's own answer to a full queue a Retry-After, as ours has it.

    It is empty where Ray is not installed here, or is older than 2.58, which brought the setting.
    """
    if not is_installed("ray"):
        return {}
    from ray.serve.schema import DeploymentSchema

    has_setting = "backpressure_config" in DeploymentSchema.model_fields
    return {"backpressure_config": {"retry_after_s": 1}} if has_setting else {}


def kuberay_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What KubeRay takes: a RayService that runs the configuration of `serve deploy`."""
    (deployment,) = config["applications"][0]["deployments"]
    needs = deployment["ray_actor_options"]
    replicas = deployment["autoscaling_config"]

    def pod(name: str, cpus: int, gpus: int = 0, **container: Any) -> dict[str, Any]:
        resources = {"cpu": str(cpus), "memory": f"{2 + 2 * cpus}Gi"}
        if gpus:
            resources["nvidia.com/gpu"] = str(gpus)
        limits = {"requests": resources, "limits": resources}
        return {
            "spec": {
                "containers": [
                    {"name": name, "image": "cvt-vision:latest", "resources": limits, **container}
                ]
            }
        }

    worker = pod("ray-worker", needs["num_cpus"], needs.get("num_gpus", 0))
    ports = [
        {"containerPort": number, "name": name}
        for name, number in (
            ("gcs-server", 6379),
            ("dashboard", 8265),
            ("client", 10001),
            ("serve", config["http_options"]["port"]),
        )
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "cvt"},
        "spec": {
            "serveConfigV2": dumped(config),
            "rayClusterConfig": {
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": pod("ray-head", 2, ports=ports),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "replicas",
                        "minReplicas": replicas["min_replicas"],
                        "maxReplicas": replicas["max_replicas"],
                        "replicas": replicas["min_replicas"],
                        "rayStartParams": {},
                        "template": worker,
                    }
                ],
            },
        },
    }


def write_config(
    folder: Path,
    models: Sequence[str],
    settings: Settings,
    address: tuple[str, int],
    how: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write `serve.yaml` and `rayservice.yaml`.

    Args:
        folder: where to write them.
        models: as of `open_models`; paths become absolute.
        settings: as of `serve_config`, as the next two.
        address: likewise.
        how: likewise.
        overwrite: replace files that are there.

    Raises:
        FileExistsError: the folder has files.
        FileNotFoundError: there is no such model.
    """
    found = {name: absolute(model) for name, model in named_models(models).items()}
    config = serve_config(found, settings, address, how)
    # Pods are reached by other names, from other machines.
    inside = serve_config(found, replace(settings, loopback=False), ("0.0.0.0", address[1]), how)
    with staged(folder, overwrite) as beside:
        beside.mkdir()
        for name, header, content in (
            (SERVE, HEADER, config),
            (KUBERAY, KUBERAY_HEADER, kuberay_config(inside)),
        ):
            (beside / name).write_text(header.format(name=name) + dumped(content), "utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def dumped(content: Mapping[str, Any]) -> str:
    """The text of a yaml file."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def absolute(model: str) -> str:
    """A model as every process of this machine finds it; one of the hub keeps its name.

    Raises:
        FileNotFoundError: there is no such model; the hub is not asked.
    """
    check_exists(model)
    return str(Path(model).resolve()) if Path(model).exists() else model
