"""What a GPU is asked to do: no cast, copy, mix of types or compilation that need not be.

Traced without a GPU, on fake tensors, which have a device, a type and strides, and no data. Four
things would look for a real device: autocast, the choices of a kernel for attention and for
convolutions, and autograd's engine. They are put in by hand as they are on a GPU with bfloat16. So
this tells what is dispatched, and nothing of how fast it runs.
"""

import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import chain, compress
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch._prims_common import suggest_memory_format
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import initialization

from cvt import CvtConfig, CvtForImageClassification, fuse
from cvt.kernels import apply_triton, recompute_activations
from cvt.modeling import Block
from cvt.train import Recipe, run_folder, train
from cvt.train.step import TrainingStep

BATCH = 64  # so large that every activation has more numbers than any weight
CVT_13 = {"depth": [1, 1, 2], "hidden_act": "quick_gelu", "num_labels": 10}  # but fewer blocks
KINDS = {
    "cvt-13": {},
    "avg": {"qkv_projection_method": ["avg"] * 3},
    "linear": {"qkv_projection_method": ["linear"] * 3},
    "no class token": {"cls_token": [False] * 3},
    "class tokens": {"cls_token": [True] * 3},
}
COPYING = ("cat", "clone", "copy_", "_to_copy")


# ------------------------------------------------------------------------------ tracing


class Call(NamedTuple):
    """An operator, and the activations that it read and wrote."""

    name: str
    inputs: list
    outputs: list


class Trace(TorchDispatchMode):
    """Notes what every operator does to activations: tensors larger than any weight.

    Attributes:
        config: the model's.
        forward, backward: the calls of both passes.
        attentions: query, key, value and options of every attention.
        blocks: what goes into every block of a model that is not fused, and what comes out.
        kept: for the backward pass; before the first block, in it, after it, in the second, ...
    """

    def __init__(self, config, weights):
        super().__init__()
        self.config, self.largest = config, max(weight.numel() for weight in weights)
        self.forward, self.backward = [], []
        self.calls = self.forward
        self.attentions, self.blocks, self.kept = [], [], [[]]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        inputs, outputs = self.activations((args, kwargs)), self.activations(results)
        self.calls.append(Call(function.overloadpacket.__name__, inputs, outputs))
        return results

    def activations(self, tree):
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return [tensor for tensor in tensors if tensor.numel() > self.largest]

    def watch(self, block):
        block.register_forward_pre_hook(lambda *_: self.kept.append([]))
        block.register_forward_hook(lambda *_: self.kept.append([]))
        block.register_forward_hook(lambda _, args, out: self.blocks.append((args[0], out[0])))

    def keep(self, tensor):
        self.kept[-1] += self.activations(tensor)
        return tensor


class FlashAttention(TorchFunctionMode):
    """Takes flash attention, and notes what it is asked for."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.asked.append((*args, kwargs))
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, scale=kwargs["scale"])[0]


def layout_of_cudnn(image, weight, backend):
    """Channels-last if anything of a convolution is."""
    layouts = (suggest_memory_format(image), suggest_memory_format(weight))
    return torch.channels_last if torch.channels_last in layouts else torch.contiguous_format


@torch.no_grad()
def backpropagate(loss, hooks):
    """Calls the nodes of autograd as its engine would; `hooks` are the tensors', by node."""
    waiting, nodes = Counter(), [loss.grad_fn]
    for node in nodes:
        for following, _ in node.next_functions:
            waiting[following] += 1
            if following and waiting[following] == 1:
                nodes.append(following)
    arrived, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        gradients = [None] * len(node._input_metadata)
        for place, gradient in arrived.pop(node).items():
            of_input = node._input_metadata[place]
            gradients[place] = gradient.sum_to_size(of_input.shape).to(of_input.dtype)
        for hook in hooks.get(node, ()):
            gradients = [hook(*gradients)]
        if hasattr(node, "variable"):  # the gradient of a weight has arrived
            continue
        edges, results = node.next_functions, getattr(node, "apply", node)(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        if hasattr(node, "apply"):  # of Python: a result for each input, be it a tensor or not
            edges = [edge for edge in edges if edge[0]]
            results = compress(results, node.needs_input_grad)
        for gradient, (following, place) in zip(results, edges, strict=True):
            if following:
                waiting[following] -= 1
                sums = arrived.setdefault(following, {})
                sums[place] = sums[place] + gradient if place in sums else gradient
                if not waiting[following]:
                    ready.append(following)


@cache
def traced(kind, mode, applied=False):
    """Of a forward in mode "eval" or of the model "fused", or of a step in mode "train"."""
    config, hooks = CvtConfig(**CVT_13 | KINDS[kind]), {}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch._C, "_select_conv_backend", lambda *_, **__: None)
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", layout_of_cudnn)
        note = lambda tensor, hook: hooks.setdefault(tensor.grad_fn, []).append(hook)  # noqa: E731
        patch.setattr(torch.Tensor, "register_hook", note)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        stack.enter_context(FakeTensorMode())
        with initialization.no_init_weights(), torch.device("cuda"):
            model = CvtForImageClassification(config).train(mode == "train")
        pixels = torch.empty(BATCH, 3, 224, 224, device="cuda")
        trace = Trace(config, model.parameters())
        recompute_activations(model)
        if applied:
            apply_triton(model)
        if mode == "fused":
            model = fuse(model, torch.bfloat16)
        for block in (module for module in model.modules() if isinstance(module, Block)):
            trace.watch(block)
        stack.enter_context(FlashAttention(trace.attentions))
        stack.enter_context(trace)
        with (
            torch.set_grad_enabled(mode == "train"),
            torch.autocast("cuda", torch.bfloat16, enabled=mode != "fused"),
            torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda tensor: tensor),
        ):
            logits = model(pixels).logits
        if mode == "train":
            trace.calls = trace.backward
            backpropagate(logits.float().logsumexp(dim=1).mean(), hooks)
    return trace


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["modules", "one pass"])
def applied(request):
    return request.param


@pytest.fixture(params=["eval", "train", "fused"])
def trace(request, kind, applied):
    return traced(kind, request.param, applied and request.param != "fused")


def types(tensors):
    return {tensor.dtype for tensor in tensors}


def storages(tensors):
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def copies(calls):
    """How often activations are copied as they are, by operator."""
    return Counter(
        call.name
        for call in calls
        if call.name in COPYING and call.outputs and types(call.inputs) == types(call.outputs)
    )


# ------------------------------------------------------------------------------ types


def test_only_pixels_and_layer_norms_cast_activations(trace):
    calls = trace.forward + trace.backward
    norms = [call for call in calls if call.name.startswith("native_layer_norm")]
    read = {id(tensor) for norm in norms for tensor in norm.inputs}
    written = {id(tensor) for norm in norms for tensor in norm.outputs}
    for call in calls:
        if call.name == "_to_copy" and types(call.inputs) != types(call.outputs):
            ((source,), (target,)) = call.inputs, call.outputs
            assert source.shape[1] == 3 or id(target) in read or id(source) in written


def test_no_operator_mixes_activations_of_several_types(trace):
    assert [call for call in trace.forward + trace.backward if len(types(call.inputs)) > 1] == []


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_residual_stream_has_one_type_from_the_first_block_to_the_last(kind, mode):
    blocks = traced(kind, mode).blocks
    assert len(blocks) == 4
    assert types(chain(*blocks)) == {torch.bfloat16}


# ------------------------------------------------------------------------------ layouts


def test_activations_are_copied_for_class_tokens_only(trace):
    """These join the tokens, then queries, keys and values; BatchNorm wants gradients without gaps.

    And the gradient of a split is a copy.
    """
    forward, backward = copies(trace.forward), copies(trace.backward)
    assert forward.pop("clone", 0) <= 1  # pixels to channels-last
    assert forward.keys() <= {"cat"}
    assert backward.keys() <= {"cat", "clone"}
    joined = [1 + 3 * stage.depth for stage in trace.config.stages if stage.cls_token]
    assert forward["cat"] <= sum(joined)
    assert backward["clone"] <= sum(joined)
    assert backward["cat"] <= sum(
        1 + stage.depth for stage in trace.config.stages if stage.cls_token
    )


def test_convolutions_read_and_write_channels_last_without_gaps(trace):
    """Behind a class token every image has a gap, which cuDNN closes with a copy of its own."""
    tokens = any(stage.cls_token for stage in trace.config.stages)
    convolutions = [c for c in trace.forward + trace.backward if c.name.startswith("convolution")]
    assert convolutions
    for image in (image for call in convolutions for image in (*call.inputs, *call.outputs)):
        _, C, H, W = image.shape
        assert image.stride()[1:] == (1, W * C, C)
        assert image.stride(0) in (H * W * C, (H * W + tokens) * C)


def test_flash_attention_takes_queries_keys_and_values_as_they_are(trace):
    """What `sdp_utils.cpp` of PyTorch asks for, on a GPU since Ampere, and the scale of CvT."""
    assert len(trace.attentions) == 4
    for *tensors, options in trace.attentions:
        for tensor in tensors:
            assert (tensor.dtype, tensor.ndim, tensor.shape[3]) == (torch.bfloat16, 4, 64)
            assert tensor.stride(3) == 1
            assert all(stride % 8 == 0 for stride in tensor.stride()[:3])  # 16 bytes
        folded = not trace.blocks  # into the weights, by `fuse`
        scale = 1.0 if folded else (64 * tensors[0].shape[1]) ** -0.5
        assert {name: value for name, value in options.items() if value} == {"scale": scale}


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", ["cvt-13", "no class token"])
@pytest.mark.parametrize(("applied", "most"), [(False, 31.1), (True, 28.1)])
def test_a_block_keeps_few_bytes_for_the_backward_pass(kind, applied, most):
    """Per number of its tokens, where there are a quarter as many keys as queries.

    LayerNorms: what they read, 4 + 4, and wrote, 2 + 2. Query: convolved 2, normalised 2, projected
    2; key and value a quarter of it each, 3. Attention: 2. MLP: hidden layer 8; its activation is
    recomputed. In one pass, what is normalised is not there: 3 less.
    """
    trace = traced(kind, "train", applied)
    for (tokens, _), kept in zip(trace.blocks, trace.kept[1::2], strict=True):
        size = sum(storage.nbytes() for storage in storages(kept).values())
        assert size / tokens.numel() < most


@pytest.mark.parametrize("kind", ["cvt-13", "class tokens", "no class token"])
def test_no_activation_is_kept_twice(kind, applied):
    trace = traced(kind, "train", applied)
    kept = storages(chain(*trace.kept)).keys()
    assert len(kept) > 20
    for call in trace.forward:
        if call.name in COPYING:
            assert len(kept & storages(call.inputs + call.outputs).keys()) < 2


# ------------------------------------------------------------------------------ training runs


@pytest.fixture
def recipe(tmp_path, photos, monkeypatch):
    """Of a small run with everything that draws, mixes, averages and clips."""
    rates = {"drop_rate": [0.1] * 3, "attention_drop_rate": [0.1] * 3, "drop_path_rate": [0.3] * 3}
    stage = asdict(tiny(depth=[1, 1, 2], **rates).stages[-1])
    alone = {name: [value] for name, value in stage.items() if name != "in_channels"}
    CvtConfig(**alone).save_pretrained(tmp_path / "config")
    monkeypatch.setattr(run_folder, "write_pictures", lambda *_: None)
    return Recipe(
        data=str(photos), model=str(tmp_path / "config"), image_size=16, epochs=2, batch_size=4,
        accumulate=2, mixup=0.8, cutmix=1.0, mixup_prob=0.5, ema_decay=0.9, clip_grad=1.0,
        precision="bf16",
    )  # fmt: skip


@pytest.mark.usefixtures("no_recompilation")
def test_the_model_of_a_run_is_compiled_once_and_whole(recipe, tmp_path, monkeypatch):
    """Over epochs and evaluations, batches mixed or not, accumulated, and every learning rate."""
    compile_with, backend = torch.compile, CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(compile_with, backend=backend, fullgraph=True))
    train(replace(recipe, compile=True, gradient_checkpointing=True), tmp_path / "run")
    assert backend.frame_count == 1


class Operators(TorchDispatchMode):
    """Counts the operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_neither_asks_the_gpu_for_a_value_nor_sends_it_one(recipe, tmp_path, monkeypatch):
    """Either would make Python wait until the GPU has done all its work."""
    operators, take_step = Operators(), TrainingStep.__call__

    def watched(training_step, step):
        setup = training_step.setup
        ahead = [next(setup.batches) for _ in range(recipe.accumulate)]
        setup.batches = chain(ahead, setup.batches)
        with operators:
            return take_step(training_step, step)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    train(recipe, tmp_path / "run")
    assert operators.counts["convolution_backward"] > 0
    waiting = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh"}
    assert waiting & operators.counts.keys() == set()


def test_every_number_of_images_has_a_graph_of_its_own(recipe, tmp_path, photos, monkeypatch):
    """So an unreadable image does not slow down the whole batches of the rest of a run."""
    shutil.copytree(photos, tmp_path / "photos")
    for path in tmp_path.glob("photos/red/*[1-9].png"):
        path.write_bytes(b"")
    graphs = []

    def backend(graph, inputs):
        graphs.append({type(x) for x in inputs})
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    recipe = replace(recipe, data=str(tmp_path / "photos"), compile=True, max_corrupt=1)
    train(recipe, tmp_path / "run")
    assert len(graphs) > 1
    assert not any(torch.SymInt in kinds for kinds in graphs)
