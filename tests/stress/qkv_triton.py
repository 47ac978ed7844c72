"""Triton's kernels beside float64, for random geometry and numbers: qkv_triton.py [SECONDS [SEED]].

On a GPU, or in Triton's interpreter without one, where everything is smaller. Prints every case
that is worse than those before it, in units of what rounding explains, and fails from 1 on, or
where anything is read or written that should not be. For the latter, on a GPU, also:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
        python tests/stress/qkv_triton.py 60

and again with `--tool racecheck` and `--tool initcheck`. None of it was ever run on a GPU.
"""

import os
import random
import sys
import time
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "gpu_kernels")]
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from test_qkv_triton import DEVICE, Case, distances

from cvt.kernels.qkv_projection import triton_kernels


def random_case(rng):
    """A geometry of up to some thousand cells, or some dozen in the interpreter."""
    large = DEVICE == "cuda"
    side = rng.randint(1, 40 if large else 9)
    return Case(
        batch=rng.choice([1, 2, 3, 5, 257 if large or side < 3 else 7]),
        grid=rng.choice([(side, side), (side, 1), (1, side), (side, side % 5 + 1)]),
        channels=rng.choice([1, 2, 3, 6, 24, 64, 96, 192, 384 if large else 32]),
        side=rng.choice([1, 3, 3, 3, 5]),
        stride=rng.choice([1, 2, 2, 2, 3, 4]),
        class_token=rng.random() < 0.5,
        dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
        programs=rng.choice([1, 2, 7, 100, 1024]),
    )


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 2**31
    end, count, worst = time.monotonic() + seconds, 0, 0.0
    assert triton_kernels(torch.empty(1, device=DEVICE))
    while time.monotonic() < end:
        case = random_case(random.Random(seed + count))
        values = case.batch * case.grid[0] * case.grid[1]
        found = distances(case, moments=values > 16, seed=seed + count)
        if max(found.values()) > worst:
            worst = max(found.values())
            print(f"seed {seed + count}: {worst:.2f} {case} {found}")
        assert worst < 1
        count += 1
    print(f"{count} cases from seed {seed} on: at most {worst:.2f} of what rounding explains")
