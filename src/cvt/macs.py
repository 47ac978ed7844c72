"""Multiply-accumulates of what PyTorch executes, by a rule of our own for each operator.

`torch.utils.flop_counter` counts nothing for an operator that it does not know, such as the fused
attention of a CPU in torch 2.14. Here an operator without a rule raises an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _matrix_product(result: Tensor, a: Tensor, *rest: Any) -> int:
    return result.numel() * a.shape[-1]


def _added_product(result: Tensor, addend: Tensor, a: Tensor, *rest: Any) -> int:
    return result.numel() * a.shape[-1]


def _convolution(result: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> int:
    transposed = len(rest) > 4 and rest[4]  # after bias, stride, padding and dilation
    return (image if transposed else result).numel() * weight[0].numel()


def _packed_convolution(result: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> int:
    return result.numel() * weight.numel() // result.shape[1]  # of all groups


def _convolution_backward(
    result: tuple[Tensor | None, ...], gradient: Tensor, image: Tensor, weight: Tensor, *rest: Any
) -> int:
    once = (image if rest[4] else gradient).numel() * weight[0].numel()
    return once * sum(grad is not None for grad in result[:2])  # of the image and of the weight


def _attention(result: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """Scores and context; query (B, h, N, d), key (B, h, N', d), value (B, h, N', d')."""
    return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    result: Any, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> int:
    """Scores once more, and the gradients of weights, query, key and value."""
    products = query[..., 0].numel() * key.shape[-2]
    return products * (3 * query.shape[-1] + 2 * value.shape[-1])


def _convolve(
    result: Any, tokens: Tensor, taps: Tensor, bias: Tensor, height: int, width: int, *rest: Any
) -> int:
    """The convolutions of query, key and value in `cvt.kernels`; a class token has none."""
    class_tokens = tokens.shape[1] - height * width
    return sum(y[:, class_tokens:].numel() for y in result[:3]) * taps.shape[1]


_ATTENTION = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
# From the name of an operator, whatever its overload, to the count.
RULES: dict[str, Callable[..., int]] = {
    "aten.mm": _matrix_product,
    "aten.bmm": _matrix_product,
    "aten.addmm": _added_product,
    "aten.baddbmm": _added_product,
    "aten.convolution": _convolution,
    "aten.convolution_backward": _convolution_backward,
    **dict.fromkeys(_ATTENTION, _attention),
    **{f"{name}_backward": _attention_backward for name in _ATTENTION},
    "mkldnn._linear_pointwise": _matrix_product,
    "mkldnn._convolution_pointwise": _packed_convolution,
    "cvt.convolve": _convolve,
}
# Norms, pooling, softmax, sums, copies, random numbers and optimizers multiply no matrices. Not
# listed are operators that PyTorch itself calls pointwise or a view.
FREE = frozenset(
    f"aten.{name}"
    for name in (
        *("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *("_native_batch_norm_legit_no_training", "batch_norm", "cudnn_batch_norm"),
        *("_batch_norm_with_update", "_batch_norm_no_update", "native_group_norm"),
        *("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "_softmax"),
        *("_safe_softmax", "_log_softmax", "logsumexp", "sum", "mean", "amax", "max", "var_mean"),
        *("_softmax_backward_data", "_log_softmax_backward_data", "nll_loss_forward"),
        *("nll_loss", "cat", "stack", "constant_pad_nd", "roll", "index", "index_put", "embedding"),
        *("select", "slice", "_unsafe_view", "clone", "copy_", "_to_copy", "fill_", "zero_"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros"),
        *("zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "scalar_tensor"),
        *("arange", "rand", "randn", "bernoulli_", "native_dropout", "uniform_", "normal_"),
        *("_fused_adamw_", "_local_scalar_dense", "resize_", "set_", "as_strided_", "cumsum"),
    )
)


def _is_free(func: Any, name: str) -> bool:
    return (
        torch.Tag.pointwise in func.tags
        or func.is_view
        or name.removesuffix("_backward") in FREE
        or name.startswith(
            ("prim.", "profiler.", "aten._foreach_", "mkldnn._reorder_", "mkldnn._is_")
        )
    )


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products, convolutions and attention inside it.

    Attention counts the same whichever kernel PyTorch picks for it: one for each element of the
    scores' and of the context's product. Tensors may be fake.

    Attributes:
        macs: those so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket)
        if name not in RULES and not _is_free(func, name):
            with self:  # what consists of other operators is counted as they are
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            raise NotImplementedError(
                f"{name}: there is no rule for its multiply-accumulates; add one to cvt.macs"
            )
        result = func(*args, **(kwargs or {}))
        if name in RULES:
            self.add(RULES[name](result, *args), args, result)
        return result

    def add(self, macs: int, args: tuple, result: Any) -> None:
        """Count one call of an operator that has a rule."""
        self.macs += macs
