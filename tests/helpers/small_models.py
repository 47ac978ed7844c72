"""Small models whose every number matters to their output: of fixed shapes, and of random ones."""

import io
import random
import warnings

import pytest
import torch

from cvt import CvtConfig, CvtForImageClassification

METHODS = ["dw_bn", "avg", "linear"]
PLACES = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)]  # which stages have a class token
CLASSES = 5


# ------------------------------------------------------------------------------ of fixed shapes


def tiny(method="dw_bn", places=(0, 0, 1), **fields):
    defaults = {
        "embed_dim": [8, 16, 24],
        "num_heads": [1, 2, 3],
        "depth": [1, 2, 3],
        "mlp_ratio": [2, 2, 2],
        "cls_token": places,
        "qkv_projection_method": [method] * 3,
        "drop_path_rate": [0, 0, 0],
        "num_labels": CLASSES,
    }
    return CvtConfig(**{**defaults, **fields})


def mixed(**fields):
    """Every projection method, and class tokens at both ends, in one model of three blocks."""
    methods = {"qkv_projection_method": METHODS, "depth": [1, 1, 1], "cls_token": (1, 0, 1)}
    return tiny(**{**methods, **fields})


def make(config, cls=CvtForImageClassification):
    """A model in eval mode whose every weight and running statistic matters to its output."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def one_block():
    """A model whose only block has a class token."""
    names = (name for name, value in random_case(0)[0].items() if isinstance(value, list))
    fields = {name: getattr(mixed(), name)[:1] for name in names}
    return make(CvtConfig(**{**fields, "drop_path_rate": [0.1], "num_labels": CLASSES}))


def images(batch=4, height=40, width=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator)


def onnx_of_trace(model, pixels):
    """What runs the ONNX graph that `torch.onnx.export(dynamo=False)` gives for a model's trace."""
    import onnxruntime

    class FirstOutput(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels, return_dict=False)[0]

    file, sizes = io.BytesIO(), {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, and that there is a newer exporter
        torch.onnx.export(
            *(FirstOutput().eval(), (pixels,), file),
            dynamo=False,
            input_names=["pixels"],
            output_names=["output"],
            dynamic_axes={"pixels": sizes, "output": {0: "batch"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue())
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


# ------------------------------------------------------------------------------ of random shapes


def seeds(everywhere, by_hand):
    """So many seeds for `parametrize`, those from `everywhere` on marked as slow."""
    slow = pytest.mark.slow
    return [*range(everywhere), *(pytest.param(s, marks=slow) for s in range(everywhere, by_hand))]


def conv_size(size, kernel, stride, padding):
    return (size + 2 * padding - kernel) // stride + 1


def random_case(seed, portable=True):
    """Fields of a legal config, and the shape of an image batch for it.

    `portable`: of those that the CvT of transformers, the port, can run.
    """
    rng = random.Random(seed)
    stages = rng.randint(1, 4)
    size = (rng.randint(5, 30), rng.randint(5, 30))
    shape = (rng.randint(1, 3 if portable else 5), rng.randint(1, 4), *size)
    widths = [rng.choice([6, 8, 12, 16])] * stages
    if rng.random() < 0.6:
        widths = [rng.choice([6, 8, 12, 16]) for _ in range(stages)]
    rows = []
    for i, width in enumerate(widths):
        patches = [
            {"patch_sizes": kernel, "patch_stride": stride, "patch_padding": padding}
            for kernel in range(1, 8)
            for stride in range(1, 5)
            for padding in range(kernel)
            # oneDNN's AVX2 backward of a strided 1×1 convolution of 2 to 7 channels, channels last,
            # writes past its memory (torch 2.14.1).
            if kernel > 1 or stride == 1
            if all(conv_size(s, kernel, stride, padding) in range(1, 17) for s in size)
        ]
        patch = rng.choice(patches)
        size = [conv_size(s, *patch.values()) for s in size]
        # In the port every class token is as wide as the last stage.
        class_token = (width == widths[-1] or not portable) and rng.random() < 0.5
        # As many queries as tokens, or a single one, which the residual connection broadcasts.
        targets = [size] if class_token else [size, [1, 1]]
        method = "dw_bn" if portable else rng.choice(METHODS)
        projections = [
            {
                "kernel_qkv": kernel,
                "stride_q": stride_q,
                "padding_q": padding_q,
                "stride_kv": stride_kv,
                "padding_kv": padding_kv,
            }
            for kernel in range(1, 6)
            for stride_q in range(1, 4)
            for padding_q in range(4)
            if [conv_size(s, kernel, stride_q, padding_q) for s in size] in targets
            for stride_kv in range(1, 4)
            for padding_kv in range(3)
            if method != "avg" or 2 * padding_kv <= kernel
            if all(conv_size(s, kernel, stride_kv, padding_kv) > 0 for s in size)
        ]
        rows.append(
            patch
            | rng.choice(projections)
            | {
                "embed_dim": width,
                "num_heads": rng.choice(
                    [heads for heads in range(1, width + 1) if width % heads == 0]
                ),
                "depth": rng.randint(i + 1, i + 2),  # the port needs more blocks than stages before
                "mlp_ratio": rng.choice([0.5, 1.0, 2.7, 4.0]),
                "qkv_bias": rng.random() < 0.5,
                "cls_token": class_token,
                "qkv_projection_method": method,
                "attention_drop_rate": rng.choice([0.0, 0.3]),
                "drop_rate": rng.choice([0.0, 0.3]),
                "drop_path_rate": rng.choice([0.0, 0.3]),
            }
        )
    config = {name: [row[name] for row in rows] for name in rows[0]}
    config |= {"num_channels": shape[1], "num_labels": rng.randint(2, 6)}
    if not portable:
        config["hidden_act"] = rng.choice(["gelu", "quick_gelu"])
        config["layer_norm_eps"] = rng.choice([1e-6, 1e-5, 1e-2])
        config["position_embedding"] = [rng.choice(["none", "learned"]) for _ in rows]
        config["image_size"] = [side + rng.choice([0, 0, 1, 9]) for side in shape[2:]]
    return config, shape


@torch.no_grad()
def randomise(model, seed):
    """Every tensor of `model` random, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 1)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif name.endswith("position_embedding"):
            tensor.copy_(0.5 * noise)
        elif tensor.ndim > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(0.2 * noise)


# ------------------------------------------------------------------------------ comparison


def assert_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = tolerance * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
