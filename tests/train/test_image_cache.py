import os
import resource
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from helpers.small_models import tiny
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.data.decoding import decode
from cvt.inference import predict
from cvt.train import image_cache as cache_module
from cvt.train import loader, resume, train
from cvt.train.image_cache import ImageCache
from cvt.train.trainer import Stopped


@pytest.fixture
def large_photos(tmp_path):
    """Photos of 400 x 300 pixels, in three classes."""
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "large" / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 256, (30, 40, 3), "uint8")
            image = Image.fromarray(pixels).resize((400, 300))
            image.save(tmp_path / "large" / name / f"{name}{i}.jpg", quality=95)
    return tmp_path / "large"


def refuse():
    raise AssertionError("it was decoded again")


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_an_image_is_decoded_once_by_all_processes(kind, large_photos, tmp_path):
    cache = ImageCache(kind, tmp_path, 3, 60, 1)
    path = large_photos / "a/a0.jpg"
    first = cache.get(1, partial(decode, path))
    assert first.size == (80, 60)
    expected = decode(path).resize((80, 60), Image.Resampling.BICUBIC)
    assert first.tobytes() == expected.tobytes() == cache.get(1, refuse).tobytes()
    with get_context("spawn").Pool(1) as pool:  # which gets a pickle, and no open file
        assert pool.apply(_pixels, (cache, 1)) == first.tobytes()
    small, long = Image.new("RGB", (30, 40), "red"), Image.new("RGB", (400, 100), "blue")
    for _ in range(2):
        assert cache.get(0, lambda: small).tobytes() == small.tobytes()
        assert cache.get(2, lambda: long).size == (240, 60)
    assert cache.get(0, refuse).size == (30, 40)
    with pytest.raises(AssertionError):  # too long to be kept
        cache.get(2, refuse)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]  # it has no name


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_images_are_kept_as_the_model_gets_them(workers, large_photos, tmp_path):
    processor = image_processor(CvtConfig.from_variant("cvt-digits"), 32)
    torch.manual_seed(0)
    model = CvtForImageClassification(tiny()).eval()
    damaged = large_photos / "a/damaged.jpg"
    damaged.write_bytes((large_photos / "a/a0.jpg").read_bytes()[:60])
    sources = [*sorted(large_photos.rglob("?[0-9].jpg")), damaged]
    cache = ImageCache("ram", tmp_path, 5 + len(sources), 48, 1)
    how = {"batch_size": 4, "workers": workers, "exact": True}

    def rows(sources, keep):
        results = list(predict.classify(model, processor, sources, **how, keep=keep))
        assert [result.error is None for result in results] == [True] * 24 + [False]
        return torch.tensor(np.stack([result.logits for result in results[:-1]]))

    expected = rows(sources, None)
    keep = partial(cache.get, first=5)
    assert torch.equal(rows(sources, keep), expected)
    for path in sources[:-1]:  # they are not read again
        path.write_bytes(damaged.read_bytes())
    assert torch.equal(rows(sources, keep), expected)


@pytest.mark.parametrize(
    "processor",
    [ViTImageProcessor(size={"height": 32, "width": 32}), ConvNextImageProcessor(do_resize=False)],
    ids=["vit", "unresized"],
)
def test_of_other_image_processors_no_validation_image_is_kept(processor, large_photos):
    model = CvtForImageClassification(tiny()).eval()
    sources = sorted(large_photos.rglob("*.jpg"))[:2]
    found = predict.classify(model, processor, sources, exact=True, keep=lambda *_: refuse())
    assert all(result.logits is not None for result in found)


def test_an_image_for_which_the_disk_is_full_is_not_kept(tmp_path, caplog):
    cache = ImageCache("disk", tmp_path, 4, 32, 1)
    white = Image.new("RGB", (32, 32), "white")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.place + 200, limits[1]))
    try:
        found = [cache.get(index, lambda: white) for index in (0, 1, 1, 2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(image.tobytes() == white.tobytes() for image in found)
    assert cache.get(0, refuse).tobytes() == white.tobytes()
    with pytest.raises(AssertionError):
        cache.get(1, refuse)
    (record,) = caplog.records
    assert "cache: File too large; other images are decoded every time" in record.message


def _pixels(cache, index):
    return cache.get(index, refuse).tobytes()


@pytest.mark.parametrize(
    ("changes", "validated_once"),
    # The first view of a training image is as in validation.
    [({}, 6), ({"head_only": True, "views": 2}, 24)],
    ids=["whole", "head"],
)
def test_runs_with_a_cache_are_equal_however_they_are_interrupted(
    recipe, large_photos, tmp_path, changes, validated_once, monkeypatch
):
    counts, validated = [], []
    monkeypatch.setattr(loader, "decode", lambda *a, **o: counts.append(1) or decode(*a, **o))
    monkeypatch.setattr(predict, "decode", lambda *a, **o: validated.append(1) or decode(*a, **o))
    settings = {"data": str(large_photos), "image_size": 16, "flip": 0.5, **changes}
    train(recipe(cache="ram", **settings), tmp_path / "ram")
    assert len(counts) == 18
    assert len(validated) == validated_once
    train(recipe(cache="disk", workers=2, **settings), tmp_path / "disk")
    run = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(recipe(cache="ram", **settings), run, Watcher(stop_after=3))
    resume(run, {"workers": 2})
    states = [final_state(tmp_path / name) | {"recipe": {}} for name in ("ram", "disk", "stopped")]
    equal(states[0], states[1])
    equal(states[0], states[2])
    train(recipe(**settings), tmp_path / "without")  # whose crops are of whole images
    found, other = states[0]["model"], final_state(tmp_path / "without")["model"]
    assert not torch.equal(found["classifier.weight"], other["classifier.weight"])


def test_the_smallest_crop_is_not_enlarged_beyond_that_of_the_image(recipe):
    for scale, ratio in ((0.35, 4 / 3), (0.08, 4 / 3), (1.0, 1.0)):
        settings = recipe(image_size=48, crop_scale=scale, crop_ratio=ratio)
        least = loader.pixels_needed(settings)
        # The smallest crop of a square has an area of `scale`, and is `ratio` times as long.
        assert least * np.sqrt(scale / ratio) >= 1.5 * 48


def test_memory_that_is_not_free_is_not_taken(recipe, tmp_path, monkeypatch):
    for kind, name in (("ram", "free_memory"), ("disk", "free_disk")):
        monkeypatch.setattr(cache_module, name, lambda *_: 2**20)
        with pytest.raises(ValueError, match=f"cache = {kind}: 38 images of 94 x 167 pixels take"):
            train(recipe(cache=kind), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with pytest.raises(ValueError, match="there are no files in memory here; try cache=disk"):
        train(recipe(cache="ram"), tmp_path / "run")
