"""A SavedModel in TensorFlow as a runtime, on a CPU, after a check that it can only compute."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvt.architecture import Architecture
from cvt.libraries import import_tensorflow, quiet
from cvt.runtime.base import Runtime
from cvt.runtime.features import FeatureSettings

FILES = re.compile(
    r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})"
)
# The operators of exported classifiers, and what other versions of Keras write for the same; others
# of TensorFlow read and write files, or run Python.
OPERATORS = {
    "Abs", "AddV2", "AvgPool", "BatchMatMulV2", "BiasAdd", "BroadcastTo", "Cast", "ConcatV2",
    "Const", "Conv2D", "DepthwiseConv2dNative", "Einsum", "Erf", "Erfc", "Exp", "ExpandDims",
    "FloorDiv", "FusedBatchNormV3", "GatherV2", "Identity", "MatMul", "Max", "Maximum", "Mean",
    "Minimum", "Mul", "Neg", "NoOp", "OnesLike", "Pack", "Pad", "PadV2", "PartitionedCall",
    "Prod", "Range", "ReadVariableOp", "RealDiv", "Reshape", "Rsqrt", "Shape", "Sigmoid",
    "Slice", "Softmax", "Split", "Sqrt", "Square", "SquaredDifference", "Squeeze",
    "StatefulPartitionedCall", "StopGradient", "StridedSlice", "Sub", "Sum", "Tile",
    "Transpose",
}  # fmt: skip
# Attributes of a function; with any other, TensorFlow could run another in its place.
ATTRIBUTES = {"_input_shapes", "_construction_context"}


class SavedModelRuntime(Runtime):
    """A SavedModel.

    Args:
        path: its folder; takes `pixel_values`, gives `logits`.
        config: the classifier's.
        precision: the graph's.
        threads: for all of TensorFlow in this process.
        image_size: as in `Runtime`.
        single: as in `Runtime`.
        features: as in `OnnxRuntime`.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: the SavedModel is damaged, asks for more than arithmetic, or takes other pixels
            than its export.json lists; or TensorFlow has begun to compute with other threads.
    """

    name = "tensorflow"

    def __init__(
        self,
        path: Path,
        config: Architecture,
        precision: str = "fp32",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(config, precision, "cpu", threads, image_size, single, features)
        self.tf = import_tensorflow()
        if threads is not None:
            self._use(threads)
        check(path)
        try:
            with quiet("tensorflow", "absl"), self.tf.device("CPU"):
                self.loaded = self.tf.saved_model.load(str(path))  # holds the weights
            self.signature = self.loaded.signatures["serving_default"]
            takes = self.signature.structured_input_signature[1]["pixel_values"].shape
        except Exception as error:  # what is damaged fails in many ways
            raise ValueError(f"{path} is not a complete SavedModel: {error}") from error
        self.check_graph(path, takes)

    def _use(self, threads: int) -> None:
        try:
            self.tf.config.threading.set_intra_op_parallelism_threads(threads)
            self.tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError:
            raise ValueError(
                f"threads = {threads}: TensorFlow has begun to compute in this process, and its "
                "threads are set before that"
            ) from None

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        with self.tf.device("CPU"):
            found = self.signature(pixel_values=self.tf.constant(pixels))
            return tuple(found[name].numpy() for name in self.outputs)


def check(path: Path) -> None:
    """Make sure that a SavedModel holds weights and arithmetic, and nothing else.

    `tf.saved_model.load` and the functions that it gives run whatever operators the SavedModel has.

    Raises:
        ValueError: it is no SavedModel, or holds something else; names that.
    """
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    try:
        files = [file for file in path.rglob("*") if not file.is_dir()]
        names = [file.relative_to(path).as_posix() for file in files]
        unexpected = [name for name in names if not FILES.fullmatch(name)]
        (graph,) = SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
        if not graph.HasField("object_graph_def"):
            unexpected.append("a graph of TensorFlow 1")  # of which all may run
        unexpected += _unexpected(graph)
    except Exception as error:  # what is damaged fails in many ways
        raise ValueError(f"{path} is not a complete SavedModel: {error}") from error
    if unexpected:
        raise ValueError(
            f"{path} was not read: it holds {unexpected[0]}, and only weights and arithmetic are "
            "taken from a SavedModel"
        )


def _unexpected(graph: Any) -> Iterator[str]:
    """What no exported classifier has, of that which can be called once a MetaGraphDef is loaded.

    Functions that save variables are in every SavedModel, and in no call.
    """
    functions = {each.signature.name: each for each in graph.graph_def.library.function}
    for function in functions.values():
        yield from function.attr.keys() - ATTRIBUTES
    called = set(graph.object_graph_def.concrete_functions)
    waiting = [*called]
    while waiting:
        for node in functions[waiting.pop()].node_def:
            if node.op not in OPERATORS:
                yield node.op
            new = {value.func.name for value in node.attr.values() if value.HasField("func")}
            waiting += new - called
            called |= new
