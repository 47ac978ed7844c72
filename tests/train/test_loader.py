import random
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from cvt import CvtConfig, image_processor
from cvt.data import LabelledImages, StreamedImages
from cvt.data.decoding import StoredImage
from cvt.train import Recipe
from cvt.train.augmentation import augmentation, mixing
from cvt.train.loader import batches, draws, seed_all
from cvt.train.plan import Plan

PLAIN = {
    "image_size": 16, "crop_scale": 1.0, "crop_ratio": 1.0, "flip": 0.0, "label_smoothing": 0.0,
}  # fmt: skip


def numbered(count):
    """Images that hold their number, of two classes in turn."""
    images = [StoredImage(str(i), Image.new("RGB", (4, 4), (i, i, i))) for i in range(count)]
    return LabelledImages(images, ["ab"[i % 2] for i in range(count)])


def order(plan, recipe, count=None, start=0):
    """The numbers of the images of every batch of a process."""
    images = numbered(count or plan.images)
    return [[int(d.image.name) for d in batch] for batch in draws(images, recipe, plan, start)]


def test_an_epoch_takes_every_image_once_and_each_in_another_order():
    plan = Plan(images=12, batch_size=4, accumulate=1, rank=0, world=1, epochs=2)
    found = order(plan, Recipe())
    assert (plan.steps_per_epoch, plan.steps) == (3, 6)
    epochs = [list(chain(*found[:3])), list(chain(*found[3:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert order(plan, Recipe(seed=1)) != found == order(plan, Recipe())


@pytest.mark.parametrize("start", [1, 3, 5])
def test_the_order_goes_on_from_any_step(start):
    plan = Plan(images=10, batch_size=2, accumulate=2, rank=0, world=1, epochs=3)
    assert order(plan, Recipe(), start=start) == order(plan, Recipe())[2 * start :]


def test_processes_can_be_traded_for_accumulated_batches():
    alone = Plan(images=24, batch_size=2, accumulate=4, rank=0, world=1, epochs=2)
    whole = list(draws(numbered(24), Recipe(), alone, 0))
    for world in (2, 4):
        plans = [Plan(24, 2, 4 // world, rank, world, 2) for rank in range(world)]
        shares = [iter(list(draws(numbered(24), Recipe(), plan, 0))) for plan in plans]
        together = []
        for step in range(alone.steps):
            of_step = {}
            for plan, share in zip(plans, shares, strict=True):
                for turn in range(plan.accumulate):
                    of_step[plan.batch_number(step, turn)] = next(share)
            together += [of_step[number] for number in sorted(of_step)]
        seen = [[(d.image.name, d.seed) for d in batch] for batch in together]
        assert seen == [[(d.image.name, d.seed) for d in batch] for batch in whole]


def test_repeated_augmentation_spreads_the_views_of_an_image_over_the_batches_of_a_step():
    plan = Plan(images=12, batch_size=2, accumulate=3, rank=0, world=1, epochs=1)
    found = order(plan, Recipe(repeats=3))
    assert found[0] == found[1] == found[2]
    assert len({tuple(batch) for batch in found}) == 2
    seeds = [d.seed for batch in draws(numbered(12), Recipe(repeats=3), plan, 0) for d in batch]
    assert len(set(seeds)) == len(seeds)


def test_fewer_images_than_a_step_needs_are_taken_again():
    plan = Plan(images=3, batch_size=8, accumulate=1, rank=0, world=1, epochs=1)
    (batch,) = order(plan, Recipe())
    assert sorted(batch) == [0, 0, 0, 1, 1, 1, 2, 2] or len(batch) == 8
    assert set(batch) == {0, 1, 2}


class Stream(StreamedImages):
    """A stream that counts what is read of it."""

    def __init__(self):
        super().__init__(["a", "b"], 12, None, None)
        object.__setattr__(self, "read", [])

    def shuffled(self, seed, rank=0, world=1, buffer=1000):
        for i in range(10**6):
            self.read.append(i)
            yield StoredImage(f"{seed}-{rank}-{i}", b""), "ab"[i % 2]


def test_a_stream_goes_on_from_any_step_and_is_read_only_as_far_as_needed():
    plan = Plan(images=12, batch_size=2, accumulate=2, rank=1, world=2, epochs=2)
    stream = Stream()
    whole = list(draws(stream, Recipe(seed=7), plan, 0))
    assert len(whole) == plan.steps * plan.accumulate
    assert [d.image.name for d in whole[0]] == ["7-1-0", "7-1-1"]
    assert len(stream.read) == plan.steps * 4
    assert list(draws(Stream(), Recipe(seed=7), plan, 2)) == whole[4:]
    assert next(draws(stream, Recipe(seed=7), plan, 0)) == whole[0]
    repeated = list(draws(Stream(), Recipe(seed=7, repeats=2), plan, 0))
    assert [d.image.name for d in repeated[0]] == ["7-1-0", "7-1-0"]
    assert repeated[0][0].seed != repeated[0][1].seed


def views(recipe, images, start=0):
    plan = Plan(len(images), recipe.batch_size, 1, 0, 1, 1)
    augment = augmentation(recipe, image_processor(CvtConfig(), image_size=16))
    return list(batches(images, augment, recipe, plan, start))


def test_a_view_depends_on_the_seed_and_its_place_alone():
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    images = LabelledImages([StoredImage("x", Image.fromarray(noise))] * 8, ["a", "b"] * 4)
    recipe = Recipe(batch_size=4, image_size=16, random_erase=1.0, auto_augment="rand-m9-inc1")
    first, second = views(recipe, images)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = views(recipe, images)
    assert torch.equal(first.pixels, again[0].pixels)
    (later,) = views(recipe, images, start=1)
    assert torch.equal(second.pixels, later.pixels)
    assert torch.equal(second.targets, later.targets)
    assert len({view.numpy().tobytes() for view in torch.cat([first.pixels, second.pixels])}) == 8


def test_no_two_views_of_a_run_have_the_same_seed():
    plan = Plan(images=6, batch_size=2, accumulate=1, rank=0, world=1, epochs=3)
    for images in (numbered(6), Stream()):
        seeds = [d.seed for batch in draws(images, Recipe(seed=5), plan, 0) for d in batch]
        assert len(set(seeds)) == len(seeds) == 18
        others = [d.seed for batch in draws(images, Recipe(seed=6), plan, 0) for d in batch]
        assert not set(seeds) & set(others)


def test_seeds_of_neighbouring_places_have_nothing_in_common():
    drawn = set()
    for numbers in ((0, 1), (1, 0), (0, 0, 1), (1,)):
        seed_all(*numbers)
        drawn.add((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert len(drawn) == 4
    assert all(len({values[i] for values in drawn}) == 4 for i in range(3))


def test_workers_do_without_shared_memory(monkeypatch, caplog):
    def fail(tensor):
        raise RuntimeError("no space")

    images = LabelledImages(
        [StoredImage(str(i), Image.new("RGB", (20, 20), (i, 0, 0))) for i in range(4)], [*"abab"]
    )
    recipe = Recipe(batch_size=4, image_size=16, workers=1)
    processor = image_processor(CvtConfig(), image_size=16)

    def one():
        augment = augmentation(recipe, processor)
        (batch,) = batches(images, augment, recipe, Plan(4, 4, 1, 0, 1, 1), 0)
        return batch

    expected = one()
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    sys.modules["cvt.train.workers"]._warn_of_shared_memory.cache_clear()
    found = one()
    assert torch.equal(found.pixels, expected.pixels)
    assert torch.equal(found.targets, expected.targets)
    assert len([line for line in caplog.messages if "shared memory" in line]) == 1


# ------------------------------------------------------------------------------ augmentation


def changed(image, **settings):
    """Forty views of an image in a recipe that changes nothing but what is asked for."""
    augment = augmentation(
        Recipe(**{**PLAIN, **settings}), image_processor(CvtConfig(), image_size=16)
    )
    found = []
    for i in range(40):
        seed_all(i)
        found.append(augment(image))
    return torch.stack(found)


@pytest.fixture
def ramp():
    """Bright to the right."""
    return Image.linear_gradient("L").resize((16, 16)).rotate(90).convert("RGB")


def test_without_augmentation_a_view_is_the_image_as_evaluation_sees_it(ramp):
    processor = image_processor(CvtConfig(), image_size=16, crop_pct=1.0)
    expected = processor(ramp, return_tensors="pt")["pixel_values"][0]
    assert (changed(ramp) - expected).abs().max() < 1e-6


def test_flips_mirror_their_share(ramp):
    flipped = changed(ramp, flip=0.5)[:, 0, 8, 0] > changed(ramp, flip=0.5)[:, 0, 8, -1]
    assert 8 < flipped.sum() < 32
    turned = changed(ramp.rotate(90), vertical_flip=0.5)[:, 0]
    assert 8 < (turned[:, 0, 8] > turned[:, -1, 8]).sum() < 32


def test_crops_keep_at_least_their_share(ramp):
    crops, whole = changed(ramp, crop_scale=0.25)[:, 0, 8], changed(ramp)[0, 0, 8]
    widths = (crops[:, -1] - crops[:, 0]) / (whole[-1] - whole[0])
    assert 0.4 < widths.min() < 0.7
    assert 0.9 < widths.max() <= 1.01


def test_erasing_puts_noise_on_its_share(ramp):
    plain, views = changed(ramp)[0], changed(ramp, random_erase=0.5)
    erased = (views != plain).flatten(1).any(1)
    assert 8 < erased.sum() < 32
    inside = [view[view != plain] for view in views[erased]]
    assert all(len(pixels.unique()) == len(pixels) > 3 for pixels in inside)  # a number each


def test_crops_are_resized_by_the_recipe():
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    image, processor = Image.fromarray(noise), image_processor(CvtConfig(), image_size=16)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    for name in ("bicubic", "bilinear"):
        resized = image.resize((16, 16), Image.Resampling[name.upper()])
        expected = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
        found = changed(image, interpolation=name)[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_crops_are_as_often_wide_as_tall():
    """Of a picture brighter to the right, and greener to the bottom, both slopes are seen."""
    rows, columns = np.mgrid[0:64, 0:64].astype("uint8") * 3
    image = Image.fromarray(np.stack([columns, rows, rows], axis=2))
    views = changed(image, crop_scale=0.5, crop_ratio=2.0)
    slopes = views.diff(dim=3)[:, 0].mean((1, 2)), views.diff(dim=2)[:, 1].mean((1, 2))
    ratios = (slopes[0] * 0.229) / (slopes[1] * 0.224)  # of a crop's width to its height
    assert 0.4 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 2.5


def test_colours_jitter_and_policies_act(ramp):
    policies = ("rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2")
    for settings in ({"color_jitter": 0.4}, *({"auto_augment": policy} for policy in policies)):
        views = changed(ramp, **settings)
        assert len({view.numpy().tobytes() for view in views}) > 10, settings
    with pytest.raises(ValueError, match="auto_augment = nonsense"):
        augmentation(Recipe(auto_augment="nonsense"), image_processor(CvtConfig(), image_size=16))


@pytest.mark.parametrize("policy", ["rand-m10-p1.0-n8-inc1", "rand-m15-mmax20-p1.0-n8-inc1"])
def test_policies_survive_their_strongest_levels(policy):
    """From level 10 timm asks Pillow to keep 0 bits and fewer, which Pillow refuses."""
    image = Image.new("RGB", (16, 16), "white")
    views = changed(image, auto_augment=policy)
    assert views.isfinite().all()


def test_mixing_gives_every_class_its_share():
    torch.manual_seed(0), np.random.seed(0)
    pixels, targets = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    mixed, shares = mixing(Recipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 5)(
        pixels.clone(), targets
    )
    assert shares.shape == (8, 5)
    assert torch.allclose(shares.sum(1), torch.ones(8))
    assert shares.min() >= 0.1 / 5 - 1e-6
    assert not torch.equal(mixed, pixels)
    same, classes = mixing(Recipe(), 5)(pixels, targets)
    assert same is pixels
    assert classes is targets


def numbers(**settings):
    """Of eight images of a constant each, 0 to 7, what each of their pixels is after mixing."""
    seed_all(3)
    recipe = Recipe(label_smoothing=0.0, **settings)
    pixels = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    mixed, shares = mixing(recipe, 8)(pixels, torch.arange(8))
    return mixed.flatten(1), shares


def test_mixup_blends_and_cutmix_pastes_the_image_at_the_same_place_from_the_end():
    partner = torch.arange(7, -1, -1)
    for settings in ({"mixup": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "mixup_switch": 0.0}):
        pixels, shares = numbers(**settings)
        own = shares[torch.arange(8), torch.arange(8)]
        expected = own * torch.arange(8) + (1 - own) * partner
        torch.testing.assert_close(pixels, expected[:, None].expand_as(pixels))
        assert 0 < own.min() < own.max() + 1e-6 < 1
    for settings in ({"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "mixup_switch": 1.0}):
        pixels, shares = numbers(**settings)
        for i, row in enumerate(pixels):
            assert set(row.tolist()) == {i, 7 - i}
            assert (row == i).float().mean() == pytest.approx(shares[i, i].item(), abs=1e-6)


@pytest.mark.parametrize(("mode", "different"), [("batch", 1), ("pair", 4), ("elem", 8)])
def test_what_mixes_alike_is_the_recipes(mode, different):
    shares = numbers(mixup=1.0, mixup_mode=mode)[1][torch.arange(8), torch.arange(8)]
    assert len({round(share, 5) for share in shares.tolist()}) == different
