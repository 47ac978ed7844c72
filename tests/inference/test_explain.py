"""Explanations: their values, and where they lie in the picture."""

import json

import numpy as np
import pytest
import torch
from helpers.small_models import images, make, mixed, random_case, tiny
from PIL import Image

import cvt
from cvt.data.image_processor import image_processor
from cvt.data.preprocessing import visible_box
from cvt.inference import explain as explain_module
from cvt.inference.explain import Explainer, explain
from cvt.inference.explanation import sheet
from cvt.inference.predict import scores
from cvt.views import split_tokens

SIZE = 64


def photo(width=90, height=60, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def classifier():
    return make(tiny())


def explainer_of(model):
    return Explainer(model, processor=image_processor(model.config, image_size=SIZE))


@pytest.fixture(scope="module")
def explainer(classifier):
    return explainer_of(classifier)


def pixels_of(explainer, picture):
    return torch.from_numpy(explainer.processor([picture]))


# ------------------------------------------------------------------------------ values


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["gradcam", "attention", "rollout"])
def test_a_gpu_gives_the_maps_of_a_cpu(classifier, method):
    processor = image_processor(classifier.config, image_size=SIZE)
    on_gpu, on_cpu = (
        Explainer(classifier, device, processor=processor)(photo(), class_name=1, method=method)
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(on_gpu.grid, on_cpu.grid, rtol=1e-3, atol=1e-5)
    assert on_gpu.score == pytest.approx(on_cpu.score, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_grad_cam_is_the_gradient_times_the_tokens_before_the_last_block(explainer, stage):
    model, picture = explainer.model, photo()
    found = explainer(picture, class_name=2, stage=stage)
    kept, block = [], model.cvt.encoder.stages[stage - 1].layers[-1]

    class Replaced(torch.nn.Module):
        """Tokens that are a leaf, in the place of those of the norm."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            kept.append(self.norm(x).detach().requires_grad_())
            return kept[0]

    norm, block.layernorm_before = block.layernorm_before, Replaced(block.layernorm_before)
    try:
        model(pixels_of(explainer, picture)).logits[0, 2].backward()
    finally:
        block.layernorm_before = norm
        model.zero_grad()
    _, tokens = split_tokens(kept[0].detach(), found.grid.shape)
    _, gradient = split_tokens(kept[0].grad, found.grid.shape)
    expected = torch.einsum("bc,bnc->bn", gradient.mean(1), tokens).clamp(min=0)
    assert found.grid.max() > 0
    np.testing.assert_allclose(found.grid.ravel(), expected[0], rtol=1e-4, atol=1e-7)


def test_the_attention_is_the_models_own_and_sums_to_one(explainer):
    picture = photo()
    found = explainer(picture, method="attention")
    own = explainer.model(pixels_of(explainer, picture), output_attentions=True).attentions
    blocks, heads = found.attention.shape[:2]
    assert (found.stage, blocks, heads) == (3, 3, 3)
    for block, weights in zip(found.attention, own[-3:], strict=True):
        np.testing.assert_array_equal(
            block.reshape(heads, -1), weights[0, :, 0, 1:].detach().numpy()
        )
    sums = found.attention.sum(axis=(2, 3)) + found.class_token
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    np.testing.assert_allclose(found.grid, found.attention.mean(axis=(0, 1)), rtol=1e-6)


def test_rollout_without_strides_is_the_product_of_the_blocks():
    explainer = explainer_of(make(tiny("linear")))
    picture = photo()
    found = explainer(picture, method="rollout")
    own = explainer.model(pixels_of(explainer, picture), output_attentions=True).attentions[-3:]
    expected = torch.eye(own[0].shape[-1])
    for weights in own:
        expected = (weights[0].mean(0) + torch.eye(len(expected))) / 2 @ expected
    np.testing.assert_allclose(found.grid.ravel(), expected[0, 1:].detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_rollout_of_even_attention_is_even(method):
    explainer = explainer_of(make(tiny(method)))
    with torch.no_grad():
        for block in explainer.model.cvt.encoder.stages[2].layers:
            block.attention.attention.projection_query.weight.zero_()
            block.attention.attention.projection_query.bias.zero_()
    found = explainer(photo(), method="rollout").grid
    assert found.min() > 0.9 * found.max() > 0
    assert found.sum() < 1  # the class token has the rest


def test_by_default_grad_cam_is_of_the_last_stage_whose_map_is_not_zero(explainer, monkeypatch):
    grids = {}

    def grad_cam(model, pixels, stage, class_id):
        logits, grid = own(model, pixels, stage, class_id)
        return logits, torch.full_like(grid, grids.get(stage, 0.0))

    own = explain_module._grad_cam
    monkeypatch.setattr(explain_module, "_grad_cam", grad_cam)
    assert explainer(photo()).stage == 3  # none has one
    grids[0] = 1.0
    assert explainer(photo()).stage == 1
    grids[1] = 1.0
    assert explainer(photo()).stage == 2
    assert explainer(photo(), stage=3).stage == 3


def test_a_class_token_may_be_in_any_stage():
    explainer = explainer_of(make(mixed()))
    found = explainer(photo(), method="rollout", stage=1)
    assert found.grid.shape == (16, 16)
    assert explainer(photo(), method="attention").stage == 3
    with pytest.raises(ValueError, match=r"stage = 2: .* only stage 1, 3 has"):
        explainer(photo(), method="attention", stage=2)


def test_a_model_without_class_token_has_grad_cam_alone():
    explainer = explainer_of(make(tiny(places=(0, 0, 0))))
    assert any(explainer(photo(), class_name=k).grid.any() for k in range(5))
    for method in ("attention", "rollout"):
        with pytest.raises(
            ValueError, match=rf"method = {method}: .* averages all tokens, has none"
        ):
            explainer(photo(), method=method)


def test_frozen_weights_inference_mode_and_gradients_of_the_user_change_nothing(classifier):
    expected = explainer_of(classifier)(photo()).grid
    weight = classifier.classifier.weight
    weight.grad = torch.ones_like(weight)
    try:
        classifier.requires_grad_(False)
        with torch.inference_mode():
            found = explainer_of(classifier)(photo()).grid
        assert (weight.grad == 1).all()
    finally:
        classifier.requires_grad_(True)
        weight.grad = None
    np.testing.assert_array_equal(found, expected)
    assert not any(module._forward_hooks for module in classifier.modules())


def test_the_score_is_that_of_the_classifier(explainer):
    picture = photo()
    (best, *_) = cvt.Classifier(explainer.model, "torch", processor=explainer.processor)(picture)
    found = explainer(picture)
    assert found.class_name == best["label"]
    assert found.score == pytest.approx(best["score"], rel=1e-5)
    logits = explainer.model(pixels_of(explainer, picture)).logits[0]
    by_name = explainer(picture, class_name="LABEL_4", method="attention")
    assert by_name.class_id == 4
    expected = scores(logits.detach().numpy(), explainer.config)[4].item()
    assert by_name.score == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------ where they lie


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (300, 300), (1000, 50), (30, 40)])
def test_the_box_is_what_the_processor_keeps(size, backend):
    config = tiny()
    short = min(size)
    resized = [256 if side == short else int(256 * side / short) for side in size]
    left, top = ((side - 224) // 2 for side in resized)
    width, height = resized
    expected = (left / width, top / height, (left + 224) / width, (top + 224) / height)
    found = visible_box(image_processor(config, 224, backend=backend), size)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    squashed = visible_box(image_processor(config, 384, backend=backend), size)
    np.testing.assert_allclose(squashed, (0, 0, 1, 1), atol=5e-4)


def test_centres_are_those_of_the_receptive_fields(explainer):
    picture = photo(64, 64)
    explainer = Explainer(
        explainer.model, processor=image_processor(explainer.config, SIZE, crop_pct=1.0)
    )
    pixels = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    image, config = pixels, explainer.config
    for number, stage in enumerate(config.stages, start=1):
        sizes = stage.patch_sizes, stage.patch_stride, stage.patch_padding
        ones = torch.ones(1, image.shape[1], stage.patch_sizes, stage.patch_sizes)
        image = torch.nn.functional.conv2d(image, ones, None, *sizes[1:])
        row, column = image.shape[2] // 2, image.shape[3] // 2 - 1
        (gradient,) = torch.autograd.grad(image[0, 0, row, column], pixels, retain_graph=True)
        found = explainer(picture, stage=number)
        for axis, place in ((1, found.rows[row]), (0, found.columns[column])):
            seen = gradient[0].sum(0).sum(axis).nonzero()
            assert (seen.min() + seen.max() + 1).item() / 2 == pytest.approx(place, abs=0.05)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90)])
def test_the_map_lies_over_the_upright_picture_at_full_size(explainer, width, height, tmp_path):
    picture = photo(width, height)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.rotate(90, expand=True).save(tmp_path / "x.png", exif=exif)
    found = explainer(tmp_path / "x.png", stage=1)
    assert found.image.size == found.overlay().size == (width, height)
    assert found.image.tobytes() == picture.tobytes()
    heat = found.heat_map()
    assert heat.shape == (height, width)
    assert heat.max() == 1
    left, top, right, bottom = found.box
    assert right - left == pytest.approx(bottom - top, rel=0.05)  # a square of the picture
    outside = np.ones_like(heat, bool)
    outside[round(top) : round(bottom), round(left) : round(right)] = False
    assert outside.any()
    assert not heat[outside].any()
    np.testing.assert_array_equal(heat, explainer(picture, stage=1).heat_map())


def test_a_hot_token_is_hot_at_its_centre(explainer):
    found = explainer(photo(), stage=2)
    grid = np.zeros_like(found.grid)
    grid[3, 5] = 7
    heat = found.heat_map(grid)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert row + 0.5 == pytest.approx(found.rows[3], abs=0.5)
    assert column + 0.5 == pytest.approx(found.columns[5], abs=0.5)
    assert heat.max() == 1
    assert not found.heat_map(np.zeros_like(grid)).any()


# ------------------------------------------------------------------------------ what is written


def test_pictures_and_arrays_are_saved_and_never_overwritten(explainer, tmp_path):
    found = explainer(photo(), method="attention")
    for name in ("a.png", "a.jpg", "a.npz"):
        found.save(tmp_path / name)
        with pytest.raises(FileExistsError):
            found.save(tmp_path / name)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["attention"], found.attention)
        np.testing.assert_array_equal(arrays["box"], found.box)
        assert arrays["size"].tolist() == [90, 60]
        assert str(arrays["class_name"]) == found.class_name
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.tobytes() == found.overlay().tobytes()
    assert found.heads().size == (3 * (90 + 5), 3 * (60 + 5))
    assert explainer(photo(8, 6), method="attention").resized(224).image.size == (224, 168)
    with pytest.raises(ValueError, match=r"a\.tiff: must end in"):
        found.save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="only attention has maps of heads"):
        explainer(photo()).heads()


def test_a_sheet_shows_every_picture_beside_its_overlay(explainer):
    found = [explainer(photo(*size)) for size in ((90, 60), (60, 90), (50, 50))]
    picture = sheet(found, columns=2)
    assert picture.width == 2 * (2 * 224 + 30)
    with pytest.raises(ValueError, match="at least one"):
        sheet([])


# ------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_name": "cat"}, ValueError, "does not know these classes: 'cat'"),
        ({"class_name": 5}, ValueError, "class_name = 5: must be from 0 to 4"),
        ({"class_name": True}, TypeError, "class_name = True: must be the name"),
        ({"method": "lime"}, ValueError, "method = 'lime': must be one of gradcam"),
        ({"stage": 0}, ValueError, "stage = 0: must be a whole number from 1 to 3"),
        ({"stage": 4}, ValueError, "stage = 4: must be a whole number from 1 to 3"),
        ({"stage": 1.0}, ValueError, "stage = 1.0: must be a whole number"),
    ],
)
def test_what_cannot_be_explained_is_named(explainer, arguments, error, message):
    with pytest.raises(error, match=message):
        explainer(photo(), **arguments)


def test_only_a_model_with_gradients_is_explained(classifier, tmp_path):
    with pytest.raises(TypeError, match="of a fused model, the one that was fused"):
        explain(cvt.fuse(classifier), photo())
    (tmp_path / "export.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"is an export, .* the model that it was exported from"):
        explain(tmp_path, photo())
    headless = make(tiny(num_labels=0))
    with pytest.raises(ValueError, match="num_labels = 0"):
        explainer_of(headless)


def test_a_list_gives_a_list_and_a_bad_image_is_named(explainer, tmp_path):
    processor = explainer.processor
    found = explain(explainer.model, [photo(), photo(seed=1)], processor=processor)
    assert [each.name for each in found] == ["<PIL image>"] * 2
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png"):
        explain(explainer.model, tmp_path / "x.png", processor=processor)
    assert images(1).shape[1] == explainer.config.num_channels


# ------------------------------------------------------------------------------ a trained model


STEPS = 200


def planted(generator, is_there):
    """A picture of noise, perhaps with a chequered square of 16 pixels; its centre (y, x), too."""
    picture = generator.normal(0.5, 0.15, (SIZE, SIZE, 3)).clip(0, 1)
    top, left = generator.integers(0, SIZE - 16 + 1, 2)
    if is_there:
        cells = np.indices((16, 16)).sum(axis=0)[..., None] // 4 % 2
        square = np.where(cells, (0.9, 0.2, 0.2), (0.1, 0.7, 0.2))
        picture[top : top + 16, left : left + 16] = square
    return (255 * picture).astype(np.uint8), (top + 8, left + 8)


def test_grad_cam_of_a_trained_model_peaks_on_the_planted_pattern():
    """The logit is the mean of what the tokens contribute: a map can only be right or wrong.

    With a class token, a model of this size may as well learn what the absence of the pattern is
    like, and its map of the pattern is then cold; which it learns depends on the seed.
    """
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    names = [name for name, value in random_case(0)[0].items() if isinstance(value, list)]
    fields = {name: getattr(tiny(), name)[:1] for name in names}
    config = cvt.CvtConfig(**{**fields, "embed_dim": [24], "cls_token": [False]}, num_labels=2)
    model = cvt.CvtForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        labels = generator.integers(0, 2, 16)
        pictures = np.stack([planted(generator, label)[0] for label in labels])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        optimizer.zero_grad()
        model(pixels, labels=torch.from_numpy(labels)).loss.backward()
        optimizer.step()
    processor = image_processor(
        config, SIZE, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    explainer, hits = Explainer(model.eval(), processor=processor), 0
    for _ in range(20):
        picture, centre = planted(generator, True)
        heat = explainer(picture, class_name=1).heat_map()
        peak = np.unravel_index(heat.argmax(), heat.shape)
        hits += all(abs(at + 0.5 - middle) <= 8 for at, middle in zip(peak, centre, strict=True))
    assert hits >= 19
