import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity

from cvt import CvtConfig, CvtForImageClassification, fuse
from cvt.macs import MacCounter
from cvt.profile import LiveMemory, Profile, inference_peak, profile, training_peak

TINY = {"depth": (1, 1, 1), "embed_dim": (16, 32, 64), "num_heads": (1, 2, 4), "num_labels": 10}


def tiny(attention: str = "sdpa", **overrides) -> CvtConfig:
    return CvtConfig(**{**TINY, **overrides}, attn_implementation=attention)


@functools.cache
def profile_tiny(size: int, batch_size: int, attention: str = "sdpa") -> Profile:
    return profile(tiny(attention), size, batch_size)


@functools.cache
def profile_variant(name: str, size: int) -> Profile:
    return profile(CvtConfig.from_variant(name), size)


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """What `run` asks of torch's allocator, in bytes: the most at a time, and all together."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
        total += max(event.nbytes(), 0)
    return peak, total


@pytest.mark.parametrize(
    ("name", "size", "parameters", "giga_macs"),
    [
        ("cvt-13", 224, 19_997_480, 4.57),
        pytest.param("cvt-13", 384, 19_997_480, 16.27, marks=pytest.mark.slow),
        pytest.param("cvt-21", 224, 31_622_696, 7.18, marks=pytest.mark.slow),
        pytest.param("cvt-21", 384, 31_622_696, 24.85, marks=pytest.mark.slow),
        ("cvt-w24", 384, 277_196_392, 194.2),
    ],
)
def test_variants_have_the_reference_parameters_and_macs(name, size, parameters, giga_macs):
    result = profile_variant(name, size)
    assert result.parameters == parameters
    assert result.macs == pytest.approx(giga_macs * 1e9, rel=0.005)


KERNELS = [
    (SDPBackend.MATH, torch.float32),
    (SDPBackend.FLASH_ATTENTION, torch.float32),
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
]


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_attention_counts_the_same_whatever_kernel_computes_it(kernel, dtype):
    query = torch.randn(2, 3, 20, 8, dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, 3, 7, 8, dtype=dtype), torch.randn(2, 3, 7, 8, dtype=dtype)
    with sdpa_kernel(kernel), MacCounter() as counter:
        attended = F.scaled_dot_product_attention(query, key, value)
    assert counter.macs == 2 * (2 * 3 * 20 * 7 * 8)
    written_out = MacCounter()
    with written_out:
        (query @ key.transpose(2, 3)).softmax(3) @ value
    assert written_out.macs == counter.macs
    if kernel is SDPBackend.FLASH_ATTENTION:
        with MacCounter() as counter:
            attended.sum().backward()
        assert counter.macs == 5 * (2 * 3 * 20 * 7 * 8)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 3), (2, 4, 5), 2 * 4 * 5 * 3),
        (nn.Linear(5, 3, bias=False), (2, 5), 2 * 5 * 3),
        (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 9), 2 * 6 * 16 * 4 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9), 2 * 4 * 49 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
        (nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.GELU()), (2, 4, 9, 9), 0),
    ],
    ids=str,
)
def test_products_and_convolutions_count_there_and_back(module, shape, macs):
    with MacCounter() as counter:
        output = module(torch.randn(shape, requires_grad=True))
    assert counter.macs == macs
    with counter:
        output.sum().backward()
    assert counter.macs == 3 * macs  # gradients of the input and of the weight


def test_the_fused_form_counts_what_its_packed_weights_do():
    config = tiny(cls_token=(0, 0, 0))  # with one, the last block would compute it alone
    model = CvtForImageClassification(config).eval()
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), MacCounter() as counter:
        fuse(model)(pixels)
    assert counter.macs == profile(config, 64).macs


def test_an_operator_without_a_rule_raises():
    matrix = torch.ones(2, 2)
    with (
        MacCounter(),
        pytest.raises(NotImplementedError, match=r"aten\.linalg_\w+: there is no"),
    ):
        torch.linalg.qr(matrix)


def test_macs_of_one_stage_are_those_counted_by_hand():
    one = {name: values[:1] for name, values in vars(CvtConfig()).items() if type(values) is list}
    config = CvtConfig(**one | {"depth": [1], "embed_dim": [8], "num_heads": [2]}, num_labels=10)
    kernel, tokens, keys, width, hidden = 7 * 7 * 3, 4 * 4, 2 * 2, 8, 32
    stage = (
        tokens * kernel * width  # token embedding
        + (tokens + 2 * keys) * 9 * width  # depthwise convolutions
        + (tokens + 2 * keys + tokens) * width * width  # query, key, value, output
        + 2 * tokens * keys * width  # attention
        + 2 * tokens * width * hidden  # MLP
    )
    result = profile(config, 16)
    assert result.stages[0].macs == stage
    assert result.macs == stage + width * 10


@pytest.mark.parametrize("name", ["cvt-13", "cvt-21"])
def test_stages_at_224_are_those_of_the_paper(name):
    stages = profile_variant(name, 224).stages
    assert [stage.name for stage in stages] == ["stage1", "stage2", "stage3"]
    assert [stage.grid for stage in stages] == [(56, 56), (28, 28), (14, 14)]
    assert [stage.tokens for stage in stages] == [3136, 784, 197]
    assert [stage.width for stage in stages] == [64, 192, 384]
    assert [stage.heads for stage in stages] == [1, 3, 6]
    assert [stage.depth for stage in stages] == {"cvt-13": [1, 2, 10], "cvt-21": [1, 4, 16]}[name]


@pytest.mark.parametrize(("name", "size"), [("cvt-13", 224), ("cvt-w24", 384)])
def test_stages_and_head_sum_to_the_whole(name, size):
    result = profile_variant(name, size)
    width = result.stages[-1].width
    head = width * 1000 + 1000 + 2 * width  # Linear and LayerNorm
    assert sum(stage.parameters for stage in result.stages) + head == result.parameters
    assert sum(stage.macs for stage in result.stages) + width * 1000 == result.macs


def test_grids_of_an_odd_size_are_those_of_a_real_forward():
    config = tiny(patch_padding=(2, 0, 1), patch_stride=(4, 1, 2))
    result = profile(config, (101, 67))
    output = CvtForImageClassification(config)(
        torch.zeros(1, 3, 101, 67), output_hidden_states=True
    )
    assert result.image_size == (101, 67)
    assert [stage.grid for stage in result.stages] == [x.shape[2:] for x in output.hidden_states]


@pytest.mark.parametrize(("attention", "batch_size"), [("sdpa", 2), ("eager", 1), ("eager", 2)])
def test_macs_per_image_depend_on_neither_batch_nor_attention_kernel(attention, batch_size):
    assert profile_tiny(64, batch_size, attention).macs == profile_tiny(64, 1).macs


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(
            "eager",
            hidden_act="quick_gelu",
            qkv_projection_method=("linear", "avg", "dw_bn"),
            cls_token=(True, False, False),
            drop_rate=(0.1, 0.1, 0.1),
        ),
    ],
    ids=["sdpa", "eager and mixed"],
)
def test_peaks_are_those_of_a_real_run(config):
    expected = profile(config, (96, 64), batch_size=3)
    torch.manual_seed(0)
    model = CvtForImageClassification(config)
    pixels = torch.randn(3, 3, 96, 64)
    there = expected.weight_bytes + pixels.nbytes
    real, _ = allocations(lambda: inference_peak(model, pixels))
    assert there + real == pytest.approx(expected.inference_bytes, rel=0.02)
    real, _ = allocations(lambda: [training_peak(model, pixels), model.zero_grad()])
    # With SSE4.1 alone, oneDNN's convolutions take 4 % of scratch memory besides.
    assert there + real == pytest.approx(expected.training_bytes, rel=0.05)
    assert inference_peak(model, pixels) == expected.inference_bytes
    assert training_peak(model, pixels) == expected.training_bytes


def test_inference_memory_is_linear_in_pixels_with_sdpa_and_not_with_eager():
    def activations(attention: str, size: int) -> int:
        result = profile_tiny(size, 1, attention)
        return result.inference_bytes - result.weight_bytes

    sdpa = [activations("sdpa", size) for size in (256, 512, 1024)]
    assert sdpa[1] / sdpa[0] == pytest.approx(4, rel=0.02)
    assert sdpa[2] / sdpa[1] == pytest.approx(4, rel=0.02)
    assert activations("eager", 1024) > 100 * sdpa[2]


def test_weights_are_a_state_dict_and_training_adds_gradients_and_two_moments():
    state = CvtForImageClassification(tiny()).state_dict()
    result = profile_tiny(64, 2)
    assert result.weight_bytes == sum(tensor.nbytes for tensor in state.values())
    assert result.inference_bytes > result.weight_bytes > 4 * result.parameters
    assert result.training_bytes > 4 * 4 * result.parameters


def test_half_precision_halves_the_memory():
    single, half = profile_tiny(64, 2), profile(tiny(), 64, 2, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.macs == single.macs
    for name in ("weight_bytes", "inference_bytes"):
        assert getattr(half, name) == pytest.approx(getattr(single, name) / 2, rel=0.01)
    # On a CPU, attention in bfloat16 keeps its weights for the backward pass.
    assert 0.5 < half.training_bytes / single.training_bytes < 0.6


def test_nothing_of_the_model_is_allocated():
    config = CvtConfig.from_variant("cvt-w24", depth=(1, 1, 2))
    result = None

    def run() -> None:
        nonlocal result
        result = profile(config, 1024)

    _, total = allocations(run)
    assert result.weight_bytes > 100e6
    assert total < 1e6


def test_profiling_leaves_config_and_default_type_alone():
    config = CvtConfig(**TINY, return_dict=False)
    before = vars(config).copy()
    profile(config, 64, dtype=torch.bfloat16)
    assert vars(config) == before
    assert torch.get_default_dtype() == torch.float32
    assert CvtForImageClassification(config).classifier.weight.std() > 0  # still initialised


def test_training_memory_is_none_where_batch_norm_sees_one_key():
    assert profile_tiny(32, 1).training_bytes is None
    assert profile_tiny(32, 2).training_bytes > 0


def test_smallest_image_is_profiled_and_a_smaller_one_refused():
    config = tiny(patch_padding=(0, 0, 0))
    least = config.minimum_image_size
    assert profile(config, least).stages[-1].grid == (1, 1)
    for size in (least - 1, (least - 1, 64), (64, least - 1)):
        with pytest.raises(ValueError, match=f"image_size.*at least {least} x {least} pixels"):
            profile(config, size)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_empty_batch_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size = {batch_size}: must be at least 1"):
        profile(tiny(), 64, batch_size)


def test_integer_type_is_refused():
    with pytest.raises(ValueError, match=r"dtype.*int8"):
        profile(tiny(), 64, dtype=torch.int8)


def test_live_memory_counts_storages_once_and_until_they_are_freed():
    there = torch.zeros(10)
    with LiveMemory([there, there[2:]]) as memory:
        assert memory.live == 40
        first = torch.zeros(100)
        view = first.view(10, 10)
        assert memory.live == 440
        del first
        assert memory.live == 440
        del view
        assert memory.live == 40
        torch.zeros(50)
        assert memory.live == 40
    assert memory.peak == 440
