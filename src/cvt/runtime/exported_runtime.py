"""A program of torch.export as a runtime, after a check that reading it runs nothing of its own."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export.passes import move_to_device_pass
from torch.utils._sympy import functions

from cvt.architecture import Architecture
from cvt.runtime.base import Runtime
from cvt.runtime.capture import pixel_shape
from cvt.runtime.features import FeatureSettings

# The files of an archive, below the folder that holds all of them.
MEMBERS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)
# The strings in a program. PyTorch looks targets up and evaluates expressions as Python.
TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|neg|getitem|[gl][te]|eq|ne)"
)
EXPRESSION = re.compile(
    r"(\b(s\d+|\d+|Symbol|Integer|Add|Mul|Pow|Max|Min|positive|integer|True|False|"
    rf"{'|'.join(functions.__all__)})\b|[\s'(),=-])*"
)
NAME = re.compile(r"[\w.]*")
NOT_RUN = ("metadata", "guards_code", "in_spec", "out_spec", "torch_version")


class ExportedRuntime(Runtime):
    """A program of torch.export; its arguments are those of `OnnxRuntime`.

    Raises:
        ValueError: the file is no such program, asks for more than arithmetic, or takes other
            pixels than its export.json lists.
    """

    name = "torch"

    def __init__(
        self,
        path: Path,
        config: Architecture,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(config, precision, device, threads, image_size, single, features)
        if threads is not None:
            torch.set_num_threads(threads)
        check(path)
        program = torch.export.load(path)
        self.check_graph(path, pixel_shape(program))
        if device != "cpu":
            program = move_to_device_pass(program, device)
        # The graph without the guards that `program.module()` puts before it: they refuse images
        # of a size that PyTorch could not prove to be harmless. `Runtime` has checked the images.
        weights = {**program.state_dict, **program.constants}
        *lifted, _ = program.graph_signature.input_specs
        self.weights = [weights[spec.target] for spec in lifted]
        self.graph = program.graph_module

    @torch.no_grad()
    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = self.graph(*self.weights, torch.from_numpy(pixels).to(self.device))
        return tuple(each.cpu().numpy() for each in outputs)


def check(path: Path) -> None:
    """Make sure that an archive of torch.export holds tensors and arithmetic, and nothing else.

    `torch.export.load` unpickles, evaluates and looks up whatever the archive asks for.

    Raises:
        ValueError: it is no such archive, or holds something else; names that.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            files = dict(zip(names, archive.namelist(), strict=True))
            unexpected = [name for name in names if not MEMBERS.fullmatch(name)]
            if len({name.lower() for name in names}) < len(names):
                unexpected.append("a file twice")
            if not unexpected:
                program = json.loads(archive.read(files["models/model.json"]))
                for kind in ("weights", "constants"):
                    stored = archive.read(files[f"data/{kind}/model_{kind}_config.json"])
                    payload = json.loads(stored)["config"].values()
                    unexpected += ["a pickle" for entry in payload if entry["use_pickle"]]
                unexpected += [repr(value) for value in _unexpected(program)]
                sample = io.BytesIO(archive.read(files["data/sample_inputs/model.pt"]))
                torch.load(sample, weights_only=True)
    except Exception as error:  # what is damaged fails in many ways
        raise ValueError(f"{path} is not a complete torch.export program: {error}") from error
    if unexpected:
        raise ValueError(
            f"{path} was not read: it holds {unexpected[0]}, and only tensors and arithmetic are "
            "taken from a program of torch.export"
        )


def _unexpected(value: Any, key: str = "") -> Iterator[str]:
    """The strings of a program that no exported classifier has."""
    if isinstance(value, dict):
        yield from (name for name in value if not NAME.fullmatch(name))
        for name, inner in value.items():
            if name not in NOT_RUN:
                yield from _unexpected(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _unexpected(inner, key)
    elif isinstance(value, str):
        expected = {"target": TARGET, "expr_str": EXPRESSION}.get(key, NAME)
        if not expected.fullmatch(value):
            yield value
