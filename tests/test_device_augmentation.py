import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms.functional import pil_to_tensor

from cvt import CvtConfig, image_processor
from cvt.datasets import LabelledImages
from cvt.images import ImageError, StoredImage, decode
from cvt.train import Recipe, finishing, unfinished
from cvt.train.augmentation import augmentation, posterize
from cvt.train.batches import Draw, Plan, Views, batches, collate, seed_all
from cvt.train.finishing import OPERATIONS, Finishing
from cvt.train.unfinished import Drawing, Sketch, Undecoded, sketching, undecoded

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
SIDE = 24
PROCESSOR = image_processor(CvtConfig(), image_size=SIDE)
POLICIES = (
    "rand-m9-mstd0.5-inc1", "rand-m9-n4-p1.0", "rand-m10-n4-p1.0-mstd2-inc1", "rand-m9-tweights",
    "rand-m30-mmax60-p1.0", "original-mstd0.5", "originalr", "v0", "v0r",
)  # fmt: skip
OPERATIONS_OF_TIMM = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "PosterizeIncreasing",
    "PosterizeOriginal", "Solarize", "SolarizeIncreasing", "SolarizeAdd", "Color",
    "ColorIncreasing", "Contrast", "ContrastIncreasing", "Brightness", "BrightnessIncreasing",
    "Sharpness", "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip


def picture(seed, size=(50, 40)):
    """Blurred colours with some noise, as photographs have."""
    generator = np.random.default_rng(seed)
    colours = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    noisy = np.asarray(colours.resize(size)) + generator.normal(0, 8, (*size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def saved(image, **settings):
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, **settings})
    return file.getvalue()


FILES = [saved(picture(seed)) for seed in range(24)]
DRAWS = [Draw(StoredImage(f"{i}.jpg", file), i % 2, (7, i)) for i, file in enumerate(FILES)]


def recipe(**settings):
    return Recipe(**{"image_size": SIDE, "crop_scale": 0.3, "augment_on_device": True, **settings})


def from_workers(settings, draws=DRAWS):
    """The batch that the workers finish."""
    return collate([Views(augmentation(settings, PROCESSOR))[draw] for draw in draws])


def unfinished_batch(settings, draws=DRAWS):
    drawing = Drawing(augmentation(settings, PROCESSOR), settings)
    read = undecoded if settings.decode_on_device else decode
    return collate([Views(drawing, read)[draw] for draw in draws])


def from_device(settings, draws=DRAWS):
    """The batch that the device finishes."""
    finish = Finishing(settings, PROCESSOR, torch.device("cpu"))
    return finish(unfinished_batch(settings, draws))


def levels(pixels, others):
    """By how many of the 255 levels of an image two batches differ."""
    return (pixels - others).abs() * torch.tensor(PROCESSOR.image_std).view(3, 1, 1) * 255


# ------------------------------------------------------------------------------ the same views


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_view_is_the_same_wherever_it_is_finished(policy, interpolation):
    settings = recipe(auto_augment=policy, interpolation=interpolation, vertical_flip=0.3)
    ours, theirs = from_device(settings), from_workers(settings)
    assert torch.equal(ours.targets, theirs.targets)
    assert len({view.numpy().tobytes() for view in theirs.pixels}) > 20
    # One level may be rounded otherwise by another Pillow, and a later operation make more of it.
    assert (levels(ours.pixels, theirs.pixels) > 0.5).float().mean() < 1e-3


@pytest.mark.parametrize("changes", [{}, {"color_jitter": 0.4}, {"color_jitter": 1.5}], ids=str)
def test_a_view_without_policy_is_the_same_too(changes):
    settings = recipe(flip=0.5, **changes)
    ours, theirs = from_device(settings), from_workers(settings)
    assert levels(ours.pixels, theirs.pixels).max() < 1.01


@pytest.mark.parametrize("interpolation", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("name", OPERATIONS_OF_TIMM)
def test_every_operation_is_pillows(name, interpolation):
    settings = {
        "interpolation": interpolation,
        "magnitude_std": float("inf"),
        "img_mean": (9, 8, 7),
    }
    theirs, ours = (AugmentOp(name, 1.0, 10, settings) for _ in range(2))
    if "Posterize" in name:
        theirs.aug_fn = ours.aug_fn = posterize
    assert sketching(ours)
    rare = Image.new("RGB", (SIDE, SIDE), "teal")
    rare.putpixel((3, 4), (255, 0, 1))
    for image in (picture(0, (SIDE, SIDE)), rare, Image.new("RGB", (SIDE, SIDE), "teal")):
        for seed in range(10):
            seed_all(seed)
            expected = pil_to_tensor(theirs(image)).int()
            seed_all(seed)
            ((operation, numbers),) = ours(Sketch(SIDE)).operations
            row = torch.zeros(1, 256, dtype=torch.float64)
            row[0, : len(numbers)] = torch.tensor([*numbers], dtype=torch.float64)
            found = OPERATIONS[operation](pil_to_tensor(image)[None], row)
            assert found.dtype == torch.uint8
            assert (found[0].int() - expected).abs().max() <= 1


def test_what_is_erased_is_noise_in_the_same_boxes():
    whole = from_workers(recipe()).pixels
    settings = recipe(random_erase=0.7)
    batch = unfinished_batch(settings)
    finish = Finishing(settings, PROCESSOR, torch.device("cpu"))
    torch.manual_seed(0)
    first = finish(batch).pixels
    expected = (from_workers(settings).pixels != whole).any(1)
    assert torch.equal((first != whole).any(1), expected)
    assert 0.5 < expected.flatten(1).any(1).float().mean() < 0.9
    noise = first.movedim(1, -1)[expected]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert not torch.equal(finish(batch).pixels, first)
    torch.manual_seed(0)
    assert torch.equal(finish(batch).pixels, first)


def test_views_are_drawn_alike_in_another_process():
    settings = recipe(auto_augment="original", color_jitter=0.4, random_erase=0.5)
    drawing = Drawing(augmentation(settings, PROCESSOR), settings)
    views = []
    for each in (drawing, pickle.loads(pickle.dumps(drawing))):
        seed_all(3)
        views.append(each(picture(1)))
    assert torch.equal(views[0].pixels, views[1].pixels)
    assert views[0][1:] == views[1][1:]


@pytest.mark.parametrize(
    ("policy", "named"),
    [("augmix-m5-w4-d2", "AugMix"), ("3a", "Desaturate, GaussianBlurRand"), ("rand-t3a", "Blur")],
)
def test_what_the_device_has_not_is_named(policy, named):
    settings = recipe(auto_augment=policy)
    with pytest.raises(ValueError, match=f"auto_augment = {policy}: the device has no .*{named}"):
        Drawing(augmentation(settings, PROCESSOR), settings)


def test_a_device_without_float64_is_refused():
    with pytest.raises(ValueError, match="augment_on_device: needs float64, which mps"):
        Finishing(recipe(), PROCESSOR, torch.device("mps"))


# ------------------------------------------------------------------------------ JPEGs


def plain_with(**settings):
    return saved(picture(0), **settings)


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return plain_with(exif=exif)


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (plain_with(), True),
        (plain_with(progressive=True, subsampling=0), True),
        (oriented(1), True),
        (oriented(6), False),
        (plain_with(format="PNG"), False),
        (saved(picture(0).convert("L")), False),
        (saved(picture(0).convert("CMYK")), False),
        (plain_with(keep_rgb=True), False),
        (plain_with(format="MPO", save_all=True, append_images=[picture(1)]), False),
        (plain_with() + b"more", False),
        (picture(0), False),
        (lambda: plain_with(), True),
        (lambda: plain_with(format="WEBP"), False),
    ],
)
def test_only_a_jpeg_that_all_decoders_see_alike_is_left_to_the_device(content, whole, tmp_path):
    sources = [StoredImage("x", content)]
    if isinstance(content, bytes):
        (tmp_path / "x.jpg").write_bytes(content)
        sources.append(tmp_path / "x.jpg")
    for source in sources:
        found = undecoded(source)
        assert isinstance(found, Undecoded) == whole
        if whole:
            assert found.name == str(source)
            assert decode(found.file).size == found.header.size == (50, 40)
        else:
            assert found.tobytes() == decode(source).tobytes()


@pytest.mark.parametrize(
    ("limit", "value"), [("LARGE_PIXELS", 1999), ("MAX_ASPECT", 1.2), ("MAX_SCANS", 0)]
)
def test_a_jpeg_beyond_a_limit_goes_to_the_decoder_that_refuses_it(monkeypatch, limit, value):
    monkeypatch.setattr(unfinished, limit, value)
    assert isinstance(undecoded(StoredImage("x", plain_with())), Image.Image)


def missing():
    raise KeyError("no such row")


@pytest.mark.parametrize("content", [b"", b"no image", FILES[0][:700], FILES[0][:-2], missing])
def test_what_cannot_be_read_has_the_error_of_the_decoder(content, tmp_path):
    source = StoredImage("broken.jpg", content)
    with pytest.raises(ImageError) as expected:
        decode(source)
    with pytest.raises(ImageError) as found:
        undecoded(source)
    assert str(found.value) == str(expected.value)
    with pytest.raises(ImageError, match=r"nowhere\.jpg"):
        undecoded(tmp_path / "nowhere.jpg")


def test_views_decoded_on_the_device_are_the_same_but_for_rounding(monkeypatch):
    png = StoredImage("one.png", plain_with(format="PNG"))
    draws = [DRAWS[0], Draw(png, 1, (8, 8)), *DRAWS[1:]]
    settings = recipe(decode_on_device=True)
    batch = unfinished_batch(settings, draws)
    assert [jpeg is None for jpeg in batch.unfinished.jpegs].count(True) == len(batch.pixels) == 1
    ours, theirs = from_device(settings, draws), from_workers(settings, draws)
    assert torch.equal(ours.targets, theirs.targets)
    assert levels(ours.pixels, theirs.pixels).max() < 3.01
    assert levels(ours.pixels, theirs.pixels).mean() < 0.5
    monkeypatch.setattr(finishing, "DECODED_AT_ONCE", 5000)  # of 2000 each
    assert torch.equal(from_device(settings, draws).pixels, ours.pixels)


def damaged(file):
    """A JPEG that has head and end, and Huffman tables of nonsense."""
    at = file.index(b"\xff\xc4") + 5
    return file[:at] + b"\xff" * 16 + file[at + 16 :]


def test_a_jpeg_that_turns_out_damaged_is_left_out_and_told(caplog):
    bad = StoredImage("bad.jpg", damaged(FILES[0]))
    with pytest.raises(ImageError) as expected:
        decode(bad)
    settings = recipe(decode_on_device=True, auto_augment="rand-m9-mstd0.5-inc1")
    found = from_device(settings, [*DRAWS[:3], Draw(bad, 0, (1,)), *DRAWS[3:]])
    assert found.failures == {"bad.jpg": str(expected.value)}
    assert "25 JPEGs are decoded by Pillow instead" in caplog.text
    assert torch.equal(found.pixels, from_device(settings).pixels)
    assert torch.equal(found.targets, from_device(settings).targets)
    alone = from_device(settings, [Draw(bad, 0, (1,))])
    assert len(alone.targets) == len(alone.pixels) == 0


def test_a_torchvision_that_decodes_no_jpeg_is_named(monkeypatch):
    def refuse(self, files):
        raise RuntimeError("not compiled with nvJPEG support")

    monkeypatch.setattr(Finishing, "decode", refuse)
    with pytest.raises(ValueError, match=r"decode_on_device: .* on cpu here \(not compiled"):
        Finishing(recipe(decode_on_device=True), PROCESSOR, torch.device("cpu"))
    Finishing(recipe(), PROCESSOR, torch.device("cpu"))


# ------------------------------------------------------------------------------ in a run


def test_batches_come_through_workers_as_without_them():
    images = LabelledImages([draw.image for draw in DRAWS], ["a", "b"] * 12)
    found = []
    for workers in (0, 2):
        settings = recipe(decode_on_device=True, auto_augment="v0", batch_size=8, workers=workers)
        drawing = Drawing(augmentation(settings, PROCESSOR), settings)
        finish = Finishing(settings, PROCESSOR, torch.device("cpu"))
        plan = Plan(24, 8, 1, 0, 1, 1)
        found.append([finish(b).pixels for b in batches(images, drawing, settings, plan, 0)])
    assert len(found[0]) == 3
    assert torch.equal(torch.cat(found[0]), torch.cat(found[1]))


class NeverWaits(TorchDispatchMode):
    """Counts copies from the CPU to the device, and refuses those that a GPU would wait for."""

    copies = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        named = named or {}
        if operator is torch.ops.aten._to_copy.default and "device" in named:
            self.copies += 1
            assert named["non_blocking"], arguments
        assert operator is not torch.ops.aten._local_scalar_dense.default
        return operator(*arguments, **named)


def test_nothing_on_a_gpu_waits_for_a_value_or_a_copy():
    """A trace without a GPU: what needs a value there, or meets a tensor left behind, raises."""
    settings = recipe(auto_augment="rand-m9-n4-p1.0", interpolation="random", random_erase=0.5)
    batch = unfinished_batch(settings)
    assert {name for name, _ in batch.unfinished.groups} >= OPERATIONS.keys() - {"upside_down"}
    with FakeTensorMode() as fake:
        finish = Finishing(settings, PROCESSOR, torch.device("cuda"))
        jpegs, files, groups, *tensors = batch.unfinished
        tensors = [fake.from_tensor(tensor) for tensor in tensors]
        pixels, targets = fake.from_tensor(batch.pixels), fake.from_tensor(batch.targets)
        left = unfinished.Unfinished(jpegs, files, groups, *tensors)
        with NeverWaits() as watch:
            found = finish(batch._replace(pixels=pixels, targets=targets, unfinished=left))
    assert watch.copies == 5
    assert found.pixels.device.type == found.targets.device.type == "cuda"
    assert found.pixels.shape == (24, 3, SIDE, SIDE)


# ------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_finishes_the_same_views_and_waits_for_nothing(policy):
    settings = recipe(auto_augment=policy, interpolation="random")
    batch = pin_memory(unfinished_batch(settings))
    finish = Finishing(settings, PROCESSOR, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = finish(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    theirs = from_workers(settings)
    assert (levels(found.pixels.cpu(), theirs.pixels) > 0.5).float().mean() < 1e-3


@pytest.mark.gpu
def test_a_gpu_decodes_nearly_the_same():
    settings = recipe(decode_on_device=True)
    finish = Finishing(settings, PROCESSOR, torch.device("cuda"))
    found = finish(pin_memory(unfinished_batch(settings)))
    assert levels(found.pixels.cpu(), from_workers(settings).pixels).mean() < 3
