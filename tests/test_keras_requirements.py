"""What the Keras classes raise where something that they need is absent or unfit.

Each situation is a process of its own: none of it may be loaded beside the other tests.
"""

import os
import subprocess
import sys

import pytest
from oldest_versions import oldest, requirements

# To `Finder`, what is in `absent` is not installed.
PRELUDE = """
import importlib.metadata, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in absent:
            return super().find_spec(name, path, target)

def version(name, installed=importlib.metadata.version):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions.get(name) or installed(name)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
importlib.metadata.version = version
"""
ASK = """
for name in ("TFCvtModel", "TFCvtForImageClassification"):
    try:
        getattr(__import__("cvt"), name)
    except ImportError as error:
        print(error)
"""
KERAS = next(pin for pin in oldest(requirements()) if pin.startswith("keras==")).partition("==")[2]
INSTALL = "pip install 'cvt-vision[tensorflow]'"
RUN_ON = "cvt's TF classes run on tensorflow, jax, torch: set KERAS_BACKEND to one of them"
ELSE = f"which is not installed: {INSTALL}, or set KERAS_BACKEND to another of "


def run(script, backend="tensorflow", absent=(), **versions):
    """The lines that a process prints."""
    variables = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    given = f"absent, versions = {set(absent)}, {versions}\n{PRELUDE}"
    done = subprocess.run(
        [sys.executable, "-c", given + script],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("situation", "message"),
    [
        ({"absent": ["keras"]}, f"cvt's TF classes need Keras 3 and TensorFlow: {INSTALL}"),
        (
            {"keras": "2.15.0"},
            f"cvt's TF classes need Keras {KERAS}, and this is 2.15.0: {INSTALL}",
        ),
        ({"keras": "3.9.2"}, f"cvt's TF classes need Keras {KERAS}, and this is 3.9.2: {INSTALL}"),
        (
            {"absent": ["tensorflow"]},
            f"Keras' backend needs tensorflow, {ELSE}tensorflow, jax, torch",
        ),
        (
            {"absent": ["jax"], "backend": "jax"},
            f"Keras' backend needs jax, {ELSE}tensorflow, jax, torch",
        ),
        ({"backend": "numpy"}, f"Keras' backend is numpy; {RUN_ON}"),
        ({"backend": "openvino"}, f"Keras' backend is openvino; {RUN_ON}"),
        ({"backend": "thenao"}, f"Unable to import backend : thenao; {RUN_ON}"),
    ],
    ids=str,
)
def test_what_is_absent_or_unfit_raises_every_time(situation, message):
    assert run(ASK, **situation) == [message, message]


def test_the_other_classes_load_nothing_of_keras():
    script = """
from cvt import CvtConfig, CvtForImageClassification
print({"keras", "tensorflow", "jax", "h5py"} & set(sys.modules))
"""
    assert run(script) == ["set()"]


# PyTorch's compiler needs Triton where there is one, and Triton ends a process that has TensorFlow.
@pytest.mark.parametrize(
    "first",
    [pytest.param("import tensorflow", marks=pytest.mark.slow), "from cvt import TFCvtModel"],
)
def test_tensorflow_and_the_compiler_of_pytorch_share_a_process(first):
    script = """
from cvt import TFCvtModel
import tensorflow, torch, torch._dynamo, torch._inductor.runtime.triton_compat
compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
print(compiled(torch.zeros(3)).tolist(), tensorflow.zeros(3).numpy().tolist())
"""
    assert run(f"{first}\n{script}") == ["[1.0, 1.0, 1.0] [0.0, 0.0, 0.0]"]
