"""The preprocessing with which the released models were evaluated."""

import io
import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.pictures import encoded, photo
from PIL import Image
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    ConvNextImageProcessorPil,
)

from cvt import CvtConfig
from cvt.checkpoints import load_preprocessing
from cvt.data.decoding import decode
from cvt.data.image_processor import image_processor
from cvt.data.preprocessing import OtherPreprocessing, Preprocessing, preprocessing_of

# What the authors evaluated each released model with.
PUBLISHED_SIZES = {
    "cvt-13": 224,
    "cvt-13-384": 384,
    "cvt-13-384-22k": 384,
    "cvt-21": 224,
    "cvt-21-384": 384,
    "cvt-21-384-22k": 384,
    "cvt-w24-384-22k": 384,
}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TINY = {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 1, 1]}


def settings_of(processor):
    return json.loads(processor.to_json_string())


def expected_settings(size, crop_pct=0.875):
    return {
        "crop_pct": crop_pct,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "ConvNextImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def chosen(settings, like):
    return {key: settings[key] for key in like}


@pytest.mark.parametrize("backend", [None, "torchvision", "pil"])
@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_every_published_model_has_its_settings_without_network(name, backend):
    for source in (name, f"microsoft/{name}"):
        processor = image_processor(source, backend=backend)
        expected = expected_settings(PUBLISHED_SIZES[name])
        assert chosen(settings_of(processor), expected) == expected
        by_torchvision = backend == "torchvision"
        one = ConvNextImageProcessor if by_torchvision else ConvNextImageProcessorPil
        assert type(processor) is one


def by_hand(image, size, crop_pct=0.875):
    """The evaluation preprocessing, written out: (3, size, size)."""
    height, width = image.shape[:2]
    if size >= 384:
        shape = (size, size)
    else:
        short = int(size / crop_pct)
        shape = (short, int(short * width / height))
        if width < height:
            shape = (int(short * height / width), short)
    resized = Image.fromarray(image).resize(shape[::-1], Image.Resampling.BICUBIC)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    cropped = np.asarray(resized)[top : top + size, left : left + size]
    return ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(480, 640), (641, 333), (300, 300), (97, 120), (1000, 257)])
@pytest.mark.parametrize(
    ("name", "changes", "size", "crop_pct"),
    [
        ("cvt-13", {}, 224, 0.875),
        ("cvt-13", {"crop_pct": 1.0}, 224, 1.0),
        ("cvt-13", {"image_size": 160, "crop_pct": 0.9}, 160, 0.9),
        ("cvt-13", {"image_size": 383}, 383, 0.875),
        ("cvt-21-384", {}, 384, 0.875),
    ],
)
def test_pixel_values_are_those_of_the_definition(name, changes, size, crop_pct, shape):
    image = photo(*shape, seed=sum(shape))
    expected = by_hand(image, size, crop_pct)
    with_pil, with_torchvision = (
        image_processor(name, backend=backend, **changes)(
            Image.fromarray(image), return_tensors="pt"
        ).pixel_values
        for backend in ("pil", "torchvision")
    )
    assert with_pil.shape == with_torchvision.shape == (1, 3, size, size)
    assert with_torchvision.dtype == torch.float32
    assert np.abs(with_pil[0].numpy() - expected).max() < 1e-5
    levels = np.abs(with_torchvision[0].numpy() - expected) * 255 * STD[:, None, None]
    # The two resizers round differently: mostly not at all, by one level of 255, rarely by two.
    assert levels.max() < 2.001
    assert (levels > 1.001).mean() < 1e-3
    assert levels.mean() < 0.4


def test_224_is_the_transform_that_torchvision_users_write():
    image = Image.fromarray(photo(480, 640))
    transform = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN.tolist(), STD.tolist()),
        ]
    )
    processor = image_processor("cvt-13", backend="pil")
    pixel_values = torch.as_tensor(processor(image, return_tensors="np").pixel_values[0])
    torch.testing.assert_close(pixel_values.float(), transform(image), rtol=0, atol=1e-5)


def test_384_squashes_as_pillow_does_bit_for_bit():
    image = Image.fromarray(photo(300, 500))
    processor = image_processor("cvt-13-384", backend="pil", do_rescale=False, do_normalize=False)
    squashed = processor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    assert squashed.dtype == np.uint8
    expected = image.resize((384, 384), Image.Resampling.BICUBIC)
    assert np.array_equal(squashed, np.asarray(expected))


def stock_config():
    return transformers.CvtConfig(**TINY)


@pytest.mark.parametrize("config", [None, stock_config, lambda: CvtConfig(**TINY)])
@pytest.mark.parametrize("backend", [None, "torchvision", "pil"])
@pytest.mark.parametrize(
    ("source", "changes"),
    [("cvt-13", {}), ("cvt-w24-384-22k", {}), ("cvt-13", {"image_size": 64, "crop_pct": 0.95})],
)
def test_a_saved_folder_gives_the_same_processor(tmp_path, source, changes, backend, config):
    processor = image_processor(source, backend=backend, **changes)
    processor.save_pretrained(tmp_path)
    if config is not None:
        config().save_pretrained(tmp_path)
    image = Image.fromarray(photo(120, 90))
    pixel_values = processor(image, return_tensors="pt").pixel_values
    for again in (
        AutoImageProcessor.from_pretrained(tmp_path, backend=backend or "pil"),
        image_processor(tmp_path, backend=backend),
        image_processor(str(tmp_path), backend=backend),
    ):
        assert type(again) is type(processor)
        assert settings_of(again) == settings_of(processor)
        assert torch.equal(again(image, return_tensors="pt").pixel_values, pixel_values)


def published_preprocessor_config(folder, **changes):
    """A file as it lies on the hub, from before transformers had image processors."""
    settings = {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
        **changes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def test_a_published_folder_is_read_and_explicit_arguments_override_it(tmp_path):
    published_preprocessor_config(tmp_path, size=96, crop_pct=0.5, image_mean=[0.5, 0.5, 0.5])
    stock_config().save_pretrained(tmp_path)
    processor = image_processor(tmp_path)
    expected = expected_settings(96, crop_pct=0.5) | {"image_mean": [0.5, 0.5, 0.5]}
    assert type(processor) is ConvNextImageProcessorPil
    assert chosen(settings_of(processor), expected) == expected

    processor = image_processor(tmp_path, image_size=128)
    assert (processor.size.shortest_edge, processor.crop_pct) == (128, 0.5)
    processor = image_processor(tmp_path, crop_pct=1)
    assert (processor.size.shortest_edge, processor.crop_pct) == (96, 1.0)
    processor = image_processor(tmp_path, image_std=[1.0, 1.0, 1.0])
    assert (*processor.image_mean, *processor.image_std) == (0.5, 0.5, 0.5, 1.0, 1.0, 1.0)


CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "feature_extractor_type": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 224}},
        {"size": {"height": 224, "width": 224}},
        {"size": {"height": None, "width": None, "shortest_edge": 224}},
        {"feature_extractor_type": None},
        {"crop_pct": None, "rescale_factor": None},
        {"image_processor_type": "ConvNextFeatureExtractor"},
        {"image_processor_type": "ConvNextFeatureExtractor", "size": {"height": 224, "width": 224}},
        CONVNEXT,
        CONVNEXT | {"image_processor_type": "ConvNextImageProcessorFast"},
        CONVNEXT | {"image_processor_type": "ConvNextImageProcessorPil", "size": 224},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [None, "pil"])
def test_settings_of_every_version_of_transformers_are_read(tmp_path, changes, backend):
    published_preprocessor_config(tmp_path, **changes)
    stock_config().save_pretrained(tmp_path)
    settings = settings_of(image_processor(tmp_path, backend=backend))
    expected = expected_settings(224)
    assert chosen(settings, expected) == expected
    assert image_processor(tmp_path, image_size=96).size.shortest_edge == 96


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": {"height": 224, "width": 192}}, "size = {'height': 224, 'width': 192}: a "),
        ({"size": {"longest_edge": 224}}, "size = {'longest_edge': 224}: a ConvNextImageProc"),
        ({"size": "224"}, "size = '224': a ConvNextImageProcessor returns squares"),
        ({"size": 0}, "size = 0: a ConvNextImageProcessor returns squares"),
        ({"feature_extractor_type": "CvtFeatureExtractor"}, "feature_extractor_type = 'CvtFeat"),
        ({"image_processor_type": "AutoTokenizer"}, "image_processor_type = 'AutoTokenizer': tr"),
    ],
)
def test_settings_that_no_processor_has_are_named(tmp_path, changes, named):
    published_preprocessor_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {named}")):
        image_processor(tmp_path)


def test_a_local_folder_of_a_published_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cvt-13").mkdir()
    published_preprocessor_config(Path("cvt-13"), size=48)
    assert image_processor("cvt-13").size.shortest_edge == 48


@pytest.mark.parametrize("config", [None, stock_config])
def test_a_folder_without_preprocessor_config_warns_of_its_assumption(tmp_path, caplog, config):
    if config is not None:
        config().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="cvt.data.decoding"):
        processor = image_processor(tmp_path)
    expected = expected_settings(224)
    assert chosen(settings_of(processor), expected) == expected
    assert f"{tmp_path} has no preprocessor_config.json" in caplog.text
    assert "224" in caplog.text
    assert image_processor(tmp_path, image_size=384).size.shortest_edge == 384


def test_a_config_gives_224_by_default(caplog):
    config = CvtConfig(**TINY)
    expected = expected_settings(224)
    assert chosen(settings_of(image_processor(config)), expected) == expected
    processor = image_processor(config, image_size=np.int64(32), crop_pct=np.float32(0.5))
    assert (processor.size.shortest_edge, processor.crop_pct) == (32, 0.5)
    assert settings_of(processor)["size"] == {"shortest_edge": 32}
    assert not caplog.records


def test_more_channels_than_a_decoded_image_has_are_refused(tmp_path):
    config = CvtConfig(num_channels=1, **TINY)
    config.save_pretrained(tmp_path)
    published_preprocessor_config(tmp_path)
    for source in (config, tmp_path):
        with pytest.raises(ValueError, match=r"num_channels = 1.*RGB"):
            image_processor(source)


def test_a_size_below_the_models_minimum_is_refused(tmp_path):
    config = CvtConfig(**TINY, patch_sizes=[64, 3, 3])
    minimum = config.minimum_image_size
    assert minimum > 32
    config.save_pretrained(tmp_path)
    published_preprocessor_config(tmp_path)
    for source in (config, tmp_path):
        assert image_processor(source, image_size=minimum).size.shortest_edge == minimum
        with pytest.raises(ValueError, match=f"image_size = {minimum - 1}.*at least {minimum}"):
            image_processor(source, image_size=minimum - 1)
    published_preprocessor_config(tmp_path, size=32)
    with pytest.raises(ValueError, match="image_size = 32"):
        image_processor(tmp_path)
    minimum = CvtConfig.from_variant("cvt-13").minimum_image_size
    with pytest.raises(ValueError, match=f"at least {minimum}"):
        image_processor("cvt-13", image_size=minimum - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size = 0: must be an integer of at least 1"),
        ({"image_size": -224}, "image_size = -224"),
        ({"image_size": 224.0}, "image_size = 224.0"),
        ({"image_size": True}, "image_size = True"),
        ({"image_size": "224"}, "image_size = '224'"),
        ({"image_size": (224, 224)}, "image_size = "),
        ({"crop_pct": 0}, "crop_pct = 0: must be a number above 0 and at most 1"),
        ({"crop_pct": 1.1}, "crop_pct = 1.1"),
        ({"crop_pct": float("nan")}, "crop_pct = nan"),
        ({"crop_pct": "0.9"}, "crop_pct = '0.9'"),
        ({"backend": "numpy"}, "backend = 'numpy': must be torchvision or pil"),
        ({"crop_percent": 0.9}, "ConvNextImageProcessorPil has no setting crop_percent"),
    ],
)
@pytest.mark.parametrize("source", ["cvt-13", "folder"])
def test_illegal_settings_are_named(source, arguments, message, tmp_path):
    published_preprocessor_config(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        image_processor(tmp_path if source == "folder" else source, **arguments)


def test_a_folder_of_another_kind_of_processor_takes_no_crop(tmp_path):
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    assert type(image_processor(tmp_path)) is transformers.ViTImageProcessorPil
    with pytest.raises(ValueError, match="its ViTImageProcessorPil has no setting crop_pct"):
        image_processor(tmp_path, crop_pct=0.9)


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    published_preprocessor_config(
        tmp_path,
        feature_extractor_type=None,
        image_processor_type="Evil",
        auto_map={"AutoImageProcessor": "evil.Evil"},
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    refusal = "image_processor_type = 'Evil'.*code in a folder is not run"
    with pytest.raises(ValueError, match=refusal):
        image_processor(tmp_path)


@pytest.mark.parametrize("source", ["cvt-14", "", "a/missing/folder"])
def test_an_unknown_source_raises_with_the_known_ones(source):
    with pytest.raises(OSError, match=r"neither a model folder nor a published.*cvt-13.*w24"):
        image_processor(source)


def test_a_repository_out_of_reach_is_named():
    with pytest.raises(OSError, match=r"someone/else is not on this machine and could not be down"):
        image_processor("someone/else")


@pytest.mark.parametrize("source", [None, 13, stock_config()])
def test_a_source_of_another_type_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"published name, a model folder or a cvt\.CvtConfig, not"):
        image_processor(source)


def test_a_broken_preprocessor_config_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        image_processor(tmp_path)


def test_decoded_photo_passes_the_processor_like_a_plain_one():
    data = encoded(photo(300, 400), "JPEG")
    processor = image_processor("cvt-13")
    decoded = processor(decode(data), return_tensors="pt").pixel_values
    plain = processor(Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
    assert torch.equal(decoded, plain)


# ------------------------------------------------------------------------------ in Pillow and numpy


SETTINGS = [
    {},
    {"crop_pct": 0.7, "size": {"shortest_edge": 64}},
    {"crop_pct": 1.3, "size": {"shortest_edge": 50}},  # pads
    {"size": {"shortest_edge": 384}},
    {"size": {"shortest_edge": 31}, "resample": Image.Resampling.BILINEAR},
    {"do_rescale": False, "do_normalize": False},
    {"do_normalize": False},
    {"do_rescale": False},
    {"image_mean": 0.3, "image_std": 0.2, "rescale_factor": 1 / 127},
    {"do_resize": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pixels_are_those_of_transformers_by_pillow_bit_for_bit(settings):
    defaults = {"size": {"shortest_edge": 48}, "image_mean": list(MEAN), "image_std": list(STD)}
    processor = ConvNextImageProcessorPil(**{**defaults, **settings})
    preprocessing = preprocessing_of(processor)
    assert isinstance(preprocessing, Preprocessing)
    draw = np.random.default_rng(0)
    for shape in [*draw.integers(20, 300, (12, 2)).tolist(), (1, 40), (700, 31)]:
        image = Image.fromarray(photo(*shape, seed=sum(shape)))
        expected = processor(image, return_tensors="np").pixel_values
        pixels = preprocessing([image])
        assert pixels.dtype == np.float32
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, expected)


def test_a_batch_has_the_pixels_of_its_images():
    preprocessing = preprocessing_of(image_processor("cvt-13"))
    images = [Image.fromarray(photo(90 + i, 120, seed=i)) for i in range(3)]
    pixels = preprocessing(images)
    assert pixels.shape == (3, 3, 224, 224)
    for image, one in zip(images, pixels, strict=True):
        np.testing.assert_array_equal(preprocessing([image])[0], one)


def test_a_processor_of_either_backend_is_computed_by_pillow():
    by_torchvision = image_processor("cvt-13", backend="torchvision")
    assert preprocessing_of(by_torchvision) == preprocessing_of(image_processor("cvt-13"))


class Crops(ConvNextImageProcessorPil):
    pass


def test_another_processor_is_called():
    image = Image.fromarray(photo(60, 80))
    for processor in (
        transformers.ViTImageProcessorPil(),
        Crops(size={"shortest_edge": 40}),
        image_processor("cvt-13", do_center_crop=True, crop_size={"height": 32, "width": 32}),
    ):
        preprocessing = preprocessing_of(processor)
        assert isinstance(preprocessing, OtherPreprocessing)
        expected = processor(image, return_tensors="np").pixel_values
        np.testing.assert_array_equal(preprocessing([image]), expected)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(preprocessing))([image]), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": "grey"}, "image_mean = 'grey': must be a number or three"),
        ({"image_std": [1, 2]}, r"image_std = \[1, 2\]: must be a number or three"),
        ({"crop_pct": 0}, "crop_pct = 0: must be a number above 0"),
        ({"resample": 17}, "resample = 17: must be 0 to 5, a filter of Pillow"),
        ({"do_resize": "yes"}, "do_resize = 'yes': must be true or false"),
        ({"rescale_factor": None, "size": [3]}, r"size = \[3\]: a ConvNextImageProcessor returns"),
    ],
)
def test_an_illegal_setting_in_a_folder_is_named(tmp_path, changes, message):
    published_preprocessor_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_preprocessing(tmp_path, CvtConfig(**TINY))
