"""Many random models against their fused forms, and the memory of large images: fused.py [MODELS].

Prints the largest differences, of the largest expected number, and the peak memory of a process.
"""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.small_models import tiny
from test_fused import EVERYTHING, REQUESTS, difference, random_models, tensors

from cvt import CvtForImageClassification, fuse
from cvt.runtime import fused

PARTS = (fused.CACHED, 10_000, 1)  # no cuts, some, image by image


@torch.no_grad()
def largest_difference(seed, compiled=False):
    """Of everything that the three models of `seed` give, asked for in every way."""
    models, pixels = random_models(seed)
    found = []
    for model in models:
        fast = fuse(model)
        for fused.CACHED in PARTS:
            for request in REQUESTS:
                expected = tensors(model(pixels, **request))
                output = tensors(fast(pixels, **request))
                assert output.keys() == expected.keys()
                found += [difference(output[name], expected[name]) for name in expected]
        if compiled:
            torch._dynamo.reset()
            output = tensors(torch.compile(fast, fullgraph=True)(pixels, **EVERYTHING))
            expected = tensors(model(pixels, **EVERYTHING))
            found += [difference(output[name], expected[name]) for name in expected]
    return max(found)


def megabytes(size):
    """Peak of a process that computes one image of `size` x `size` pixels."""
    torch.set_num_threads(1)
    fast = fuse(CvtForImageClassification(tiny(embed_dim=[32, 32, 36])).eval())
    fast(torch.randn(1, 3, size, size))
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    worst = {seed: largest_difference(seed, compiled=seed % 100 == 0) for seed in range(count)}
    seed = max(worst, key=worst.__getitem__)
    print(f"{count} models: at most {worst[seed]:.1e} apart, by seed {seed}")
    assert worst[seed] < 1e-5

    context = multiprocessing.get_context("spawn")
    peaks = []
    for size in (512, 1024, 1536):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(megabytes, (size,)))
        print(f"{size} x {size}: {peaks[-1]:.0f} MB at most")
    growth = (peaks[2] - peaks[0]) / (peaks[1] - peaks[0])
    print(f"Above the first, the last takes {growth:.2f} times what the second does")
    assert growth < 3.5  # 2.7 if linear, 5.3 if quadratic
