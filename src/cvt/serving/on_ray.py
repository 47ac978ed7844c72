"""The service on a cluster: the same application in every replica of a deployment of Ray Serve."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve

from cvt.serving.application import create_app
from cvt.serving.ray_config import DEPLOYMENT
from cvt.serving.served_model import Compute, Outputs
from cvt.serving.server import open_models
from cvt.serving.settings import Settings, read_key


def application(args: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration of Ray Serve, whose `import_path` names this function.

    Args:
        args: `models`, models by the names that requests give; `runtime`, `precision`, `device`,
            `threads` and `verify`, as of `cvt.Classifier`; `settings`, the fields of `Settings`;
            `api_key_file`, a file on every node. All but the models may be left out.
    """

    def build() -> FastAPI:
        return replica(args)

    return serve.deployment(name=DEPLOYMENT)(serve.ingress(build)()).bind()


def replica(args: Mapping[str, Any]) -> FastAPI:
    """The application of one replica, which has models of its own.

    Raises:
        TypeError: there is no such argument.
        ValueError: as `open_models` and `create_app`.
    """
    words = [f"{name}={model}" for name, model in args["models"].items()]
    how = {name: args[name] for name in args.keys() - {"models", "settings", "api_key_file"}}
    key = read_key(Path(args["api_key_file"])) if args.get("api_key_file") else None
    settings = Settings(**args.get("settings", {}), api_key=key)
    computing = ThreadPoolExecutor(1, "compute")

    def batched(compute: Compute, max_batch: int) -> Callable[[np.ndarray], Awaitable[Outputs]]:
        wait = settings.batch_wait_ms / 1000

        @serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=wait)
        async def in_thread(images: list[np.ndarray]) -> list[Outputs]:
            return await asyncio.get_running_loop().run_in_executor(computing, compute, images)

        return in_thread

    return create_app(open_models(words, **how), settings, batched)
