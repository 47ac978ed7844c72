"""Position embeddings and patch embeddings, which the paper's ablations vary, wherever they go."""

import numpy as np
import pytest
import torch
from helpers.small_models import images, make, onnx_of_trace, tiny

from cvt import (
    CvtBackbone,
    CvtConfig,
    CvtForImageClassification,
    CvtModel,
    fuse,
    image_processor,
)
from cvt.checkpoints import CheckpointError, convert, load_authors, transformers_to_authors
from cvt.profile import profile
from cvt.train.optim import parameter_groups
from cvt.views import resize_tokens

EVERYWHERE = {"position_embedding": ["learned"] * 3, "image_size": 48}
SOME = {"position_embedding": ["learned", "none", "learned"], "image_size": [48, 32]}
PATCHES = {"patch_sizes": [4, 2, 2], "patch_stride": [4, 2, 2], "patch_padding": [0, 0, 0]}
MODELS = {
    "every stage": EVERYWHERE,
    "class tokens": EVERYWHERE | {"cls_token": [True] * 3},
    "no class token": SOME | {"cls_token": [False] * 3, "hidden_act": "quick_gelu"},
    "patches": PATCHES,
    "patches with positions": PATCHES | SOME,
}
SIZES = [(48, 48), (48, 32), (16, 16), (17, 70)]
every_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)


def stages(model):
    return model.get_submodule("encoder" if isinstance(model, CvtModel) else "cvt.encoder").stages


@torch.no_grad()
def tokens_of(stage, image):
    """The tokens that the blocks of a stage are given, in training."""
    seen = []
    hook = stage.dropout.register_forward_hook(lambda _module, _input, output: seen.append(output))
    stage(image, False)
    hook.remove()
    return seen[0]


# ------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("class_token", [False, True])
def test_a_vector_is_added_to_each_token_of_the_image(class_token):
    model = make(tiny(**EVERYWHERE, places=[class_token] * 3))
    for stage, config, side in zip(stages(model), model.config.stages, (12, 6, 3), strict=True):
        width = config.embed_dim
        assert config.position_grid == (side, side)
        assert stage.position_embedding.shape == (1, side**2, width)
        size = [4 * side, 4 * side] if config.in_channels == 3 else [2 * side, 2 * side]
        image = torch.randn(2, config.in_channels, *size)
        found = tokens_of(stage, image)
        added = stage.position_embedding.detach().clone()
        stage.position_embedding.data.zero_()
        without = tokens_of(stage, image)
        first = int(class_token)
        torch.testing.assert_close(found[:, first:], without[:, first:] + added)
        assert torch.equal(found[:, :first], without[:, :first])


def interpolated(values, size):
    """Linear interpolation of values, (n, ...), at the centres of `size` cells, by numpy."""
    n = len(values)
    centres = (np.arange(size) + 0.5) * n / size - 0.5
    columns = values.reshape(n, -1).T
    found = [np.interp(centres, np.arange(n), column) for column in columns]
    return np.array(found).T.reshape(size, *values.shape[1:])


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (2, 9), (7, 3), (6, 10)])
def test_at_another_size_the_positions_are_interpolated_linearly(size):
    grid = (3, 5)
    tokens = torch.randn(1, 15, 4, dtype=torch.float64)
    rows = interpolated(tokens.numpy().reshape(*grid, 4), size[0])
    expected = interpolated(rows.swapaxes(0, 1), size[1]).swapaxes(0, 1).reshape(1, -1, 4)
    np.testing.assert_allclose(resize_tokens(tokens, grid, size).numpy(), expected, atol=1e-12)


def test_autocast_interpolates_large_grids_too():
    tokens = torch.randn(1, 40 * 3, 4, generator=torch.Generator().manual_seed(0))
    expected = resize_tokens(tokens, (3, 40), (5, 600))
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_tokens(tokens, (3, 40), (5, 600))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_models_without_positions_have_the_weights_that_they_had():
    with torch.device("meta"):
        names = CvtForImageClassification(CvtConfig(image_size=64)).state_dict().keys()
    assert names
    assert not [name for name in names if "position" in name]


def test_positions_are_drawn_as_class_tokens_are_and_do_not_decay():
    config = CvtConfig.from_variant("cvt-7", image_size=64, position_embedding=["learned"] * 3)
    torch.manual_seed(0)
    model = CvtForImageClassification(config)
    for stage in stages(model):
        assert stage.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    decaying = {
        id(p) for g in parameter_groups(model, 0.1) for p in g["params"] if g["weight_decay"]
    }
    positions = {id(stage.position_embedding) for stage in stages(model)}
    assert len(positions) == 3
    assert not positions & decaying


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"image_size": None}, r"stage 2: position_embedding\[1\] = 'learned': needs image_size"),
        ({"image_size": 2}, "image_size = 2: this model needs at least 3 x 3 pixels"),
        ({"image_size": [64, 2]}, r"image_size = \[64, 2\]: this model needs at least 3 x 3"),
    ],
)
def test_a_grid_that_is_unknown_or_empty_is_refused(fields, fault):
    with pytest.raises(ValueError, match=fault):
        tiny(position_embedding=["none", "learned", "none"], **fields)


@every_model
def test_a_folder_gives_the_model_back(tmp_path, fields):
    model = make(tiny(**fields))
    model.save_pretrained(tmp_path)
    again = CvtForImageClassification.from_pretrained(tmp_path).eval()
    for name in ("position_embedding", "image_size", *PATCHES):
        assert getattr(again.config, name) == getattr(model.config, name)
    for size in SIZES:
        pixels = images(2, *size)
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    backbone = CvtBackbone.from_pretrained(tmp_path).eval()
    expected = model.cvt(pixels).last_hidden_state
    assert torch.equal(backbone(pixels).feature_maps[0], expected)


@every_model
def test_their_parameters_are_counted(fields):
    config = tiny(**fields)
    with torch.device("meta"):
        model = CvtForImageClassification(config)
    assert config.parameters == sum(p.numel() for p in model.parameters())


def test_their_cost_is_counted():
    small = {"depth": [1, 1, 1]}
    found, plain = (profile(tiny(**small, **fields), 48) for fields in (EVERYWHERE, {}))
    positions = sum(stage.position_embedding.numel() for stage in stages(make(tiny(**EVERYWHERE))))
    assert found.parameters - plain.parameters == positions
    assert found.macs == plain.macs  # an addition
    assert found.training_bytes > plain.training_bytes


# ------------------------------------------------------------------------------ patches


def test_a_patch_embedding_looks_at_each_pixel_once():
    """Kernel and stride are equal and nothing is padded: the image is divided."""
    model = make(tiny(**PATCHES))
    pixels = images(1, 16, 16).requires_grad_()
    embedding = stages(model)[0].embedding
    tokens, grid = embedding(pixels)
    assert grid == (4, 4)
    tokens[0, 5].square().sum().backward()  # in row 1, column 1
    seen = pixels.grad[0].abs().sum(0) > 0
    assert seen[4:8, 4:8].all()
    assert seen.sum() == 16


# ------------------------------------------------------------------------------ other forms


@every_model
@torch.no_grad()
def test_the_fused_form_computes_the_same_at_every_size(fields):
    for model in (make(tiny(**fields)), make(tiny(**fields), CvtModel)):
        fast = fuse(model)
        for size in SIZES:
            found = fast(images(2, *size), return_dict=False)
            for mine, expected in zip(found, model(images(2, *size)).to_tuple(), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_trace_takes_every_size():
    model = make(tiny(**PATCHES | SOME, depth=[1, 1, 1]))
    for traced in (model, fuse(model)):
        run = onnx_of_trace(traced, images(2, 48, 32))
        for size in SIZES:
            expected = model(images(2, *size)).logits
            torch.testing.assert_close(run(images(2, *size)), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ authors' files


def test_an_authors_file_has_no_place_for_positions(tmp_path):
    model = make(tiny(**SOME))
    model.save_pretrained(tmp_path / "model")
    fault = "no place for the position embedding that the configuration describes in stage 1, 3"
    with pytest.raises(CheckpointError, match=rf"out\.pth: .*{fault}"):
        convert(tmp_path / "model", tmp_path / "out.pth", to="authors")
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(ValueError, match=r"not weights of a CvT: cvt.*stages\.0\.pos"):
        transformers_to_authors(model.state_dict())
    plain = make(tiny())
    torch.save(transformers_to_authors(plain.state_dict()), tmp_path / "authors.pth")
    with pytest.raises(CheckpointError, match=fault):
        load_authors(tmp_path / "authors.pth", config=model.config)
    found = load_authors(tmp_path / "authors.pth", config=plain.config)
    assert torch.equal(found.classifier.weight, plain.classifier.weight)


def test_a_file_of_weights_alone_does_not_tell_their_grid(tmp_path):
    config = CvtConfig.from_variant("cvt-digits", **{**EVERYWHERE, "image_size": 16})
    model = CvtForImageClassification(config)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="grid of its position embedding"):
        load_authors(tmp_path / "weights.bin", hidden_act="quick_gelu")
    found = load_authors(tmp_path / "weights.bin", config=config)
    mine, expected = (m.cvt.encoder.stages[0].position_embedding for m in (found, model))
    assert torch.equal(mine, expected)


def test_patches_pass_through_an_authors_file(tmp_path):
    model = make(tiny(**PATCHES, hidden_act="quick_gelu"))
    model.save_pretrained(tmp_path / "model")
    image_processor(model.config, 40).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out.pth", to="authors")
    found = load_authors(tmp_path / "out.pth", config=model.config).eval()
    assert torch.equal(found(images()).logits, model(images()).logits)
