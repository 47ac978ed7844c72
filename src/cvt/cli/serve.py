"""`cvt serve`."""

from dataclasses import replace
from pathlib import Path

import click

from cvt.cli.options import (
    FILE,
    FOLDER,
    FiniteRange,
    argument,
    command,
    count_option,
    device_option,
    force_option,
    no_verify_option,
    precision_option,
    runtime_option,
    threads_option,
    verbose_option,
)


@command
@argument(
    "models",
    nargs=-1,
    required=True,
    help="Each a MODEL that classifies, or an exported folder; NAME=MODEL names it for requests.",
)
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in."
)
@click.option("--port", type=click.IntRange(min=0, max=65535), default=8000, help="Port.")
@runtime_option
@precision_option
@device_option
@threads_option()
@count_option("max_batch", "Images that are run through a model at a time.", 32)
@click.option(
    "--batch-wait-ms",
    type=FiniteRange(min=0),
    default=5.0,
    help="Milliseconds that an image waits for others.",
)
@count_option("max_queue", "Images in work at a time; more get status 503.", 256)
@click.option(
    "--max-mib",
    type=click.IntRange(min=1),
    default=32,
    help="Largest request in MiB; larger ones get status 413.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=50_000_000,
    help="Largest image in pixels; larger ones get status 422.",
)
@click.option(
    "--timeout",
    type=FiniteRange(min=0, min_open=True),
    default=30.0,
    help="Longest time of a request in seconds; longer ones get status 504.",
)
@click.option("--api-key-file", type=FILE, help="File with the key that requests must send.")
@click.option(
    "--write-config",
    type=FOLDER,
    help="Folder for the files of a cluster with Ray Serve or KubeRay; nothing is served.",
)
@no_verify_option
@verbose_option
@force_option("Overwrite the files of --write-config.")
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    max_batch: int,
    batch_wait_ms: float,
    max_queue: int,
    max_mib: int,
    max_pixels: int,
    timeout: float,
    api_key_file: Path | None,
    write_config: Path | None,
    no_verify: bool,
    verbose: bool,
    force: bool,
) -> None:
    """Serve models over HTTP: POST images, get their classes; batched as they come."""
    from cvt.cli.console import err, out, quiet_libraries
    from cvt.http_server import is_loopback, listening
    from cvt.serving.server import open_models, serve
    from cvt.serving.settings import MIB, Settings, read_key

    def ready(address: str) -> None:
        out.print(f"The service is at {address}docs  (Ctrl-C stops it)")
        if not (is_loopback(host) or api_key_file):
            err.print(
                f"everyone who reaches {host} of this machine can use the service", fg="yellow"
            )

    quiet_libraries(verbose)
    key = read_key(api_key_file) if api_key_file else None
    settings = Settings(
        max_batch, batch_wait_ms, max_queue, max_mib * MIB, max_pixels, timeout, key
    )
    if write_config:
        from cvt.serving.ray_config import write_config as write

        how = {
            "runtime": runtime,
            "precision": precision,
            "device": device,
            "threads": threads,
            "verify": not no_verify,
            "api_key_file": api_key_file and str(api_key_file.resolve()),
        }
        settings = replace(settings, api_key=None, loopback=is_loopback(host))
        write(write_config, models, settings, (host, port), how, force)
        out.print(f"{write_config}: serve.yaml for Ray Serve, rayservice.yaml for KubeRay")
        return
    with listening(host, [port]) as listener:  # a port that is taken is an error at once
        err.print("opening the models; one that is new to this machine is converted first")
        opened = open_models(models, runtime, precision, device, threads, verify=not no_verify)
        for name, model in opened.items():
            err.print(f"{name}: {model.runtime.describe}")
        serve(opened, settings, listener, ready)
