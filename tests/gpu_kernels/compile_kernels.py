"""Compiles the kernels for GPUs that need not be there: compile_kernels.py.

Prints a line of JSON for each: its name, the registers of a thread, and the bytes that it spills.
Not to be run with TRITON_INTERPRET, which leaves nothing that could be compiled.
"""

import json
import os
import re
from contextlib import redirect_stdout
from io import StringIO

os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cvt.kernels import qkv_triton

CAPABILITIES = {torch.bfloat16: (80, 90), torch.float32: (90,)}  # of an A100, of an H100 or H200
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_instead(launch, kernel, *tensors, **flags):
    """In the place of `Launch.__call__`."""
    constants = {**launch.options, **flags}
    options = {"num_warps": constants.pop("num_warps")}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= zip(kernel.arg_names, (TYPES[tensor.dtype] for tensor in tensors), strict=False)
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))}
    source = ASTSource(kernel, signature, constants, aligned)
    for capability in CAPABILITIES[tensors[0].dtype]:
        with redirect_stdout(StringIO()) as log:
            triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
        found = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log.getvalue())
        stack, stores, loads = map(int, found)
        name = f"{kernel.__name__}, {tensors[0].dtype}, sm_{capability}"
        spilled = stack + stores + loads
        print(json.dumps({"name": name, "registers": int(registers), "spilled": spilled}))


if __name__ == "__main__":
    qkv_triton.Launch.__call__ = compile_instead
    taps, lines = torch.empty(3, 9, 384, device="meta"), torch.empty(3, 2, 384, device="meta")
    for dtype in TYPES:
        tokens = torch.empty(2, 197, 384, dtype=dtype, device="meta")
        inputs = tokens, taps, (14, 14), 2, True  # of the last stage, at 224 pixels
        *outputs, _ = qkv_triton.forward(tokens, taps, lines[:, 0], *inputs[2:])
        qkv_triton.backward(outputs, outputs, lines, *inputs)
