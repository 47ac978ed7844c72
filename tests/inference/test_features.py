import numpy as np
import pytest
import torch
from helpers.small_models import make, tiny

from cvt import image_processor
from cvt.data import decode, images_below
from cvt.inference.features import feature_runtime, features
from cvt.runtime import open_runtime


@pytest.fixture
def paths(photos):
    return list(images_below(photos))


def plain(model, processor, paths):
    """The same with the model itself, image by image."""
    rows = []
    for path in paths:
        pixels = processor(decode(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model.cvt(pixels)
            tokens = output.cls_token_value
            if tokens is None:
                tokens = output.last_hidden_state.flatten(2).transpose(1, 2)
            rows.append(model.layernorm(tokens).mean(dim=1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("places", [(0, 0, 1), (0, 0, 0)], ids=["class token", "mean"])
def test_features_are_what_the_classifier_receives(paths, places, workers):
    model = make(tiny(places=places))
    processor = image_processor(model.config, image_size=32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    steps = []
    found = features(model, processor, paths, 7, workers, lambda: steps.append(1))
    assert found.values.shape == (36, 24)
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, plain(model, processor, paths), rtol=0, atol=1e-5)
    assert found.positions.tolist() == list(range(36))
    assert (found.failures, len(steps)) == ([], 36)
    assert model.config.num_labels == 5
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_images_that_cannot_be_decoded_are_listed(paths, classifier, processor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    found = features(classifier, processor, [paths[0], broken, paths[1]], batch_size=2)
    assert found.positions.tolist() == [0, 2]
    assert [(each.position, each.name) for each in found.failures] == [(1, str(broken))]
    expected = features(classifier, processor, paths[:2], batch_size=2)
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"none of the 1 images could be decoded: .*broken\.png"):
        features(classifier, processor, [broken])
    with pytest.raises(ValueError, match="there are no images"):
        features(classifier, processor, [])


def test_a_runtime_of_logits_is_refused(paths, classifier, processor):
    runtime = feature_runtime(classifier, "cpu", threads=1)
    assert runtime.describe == "fused fp32 on cpu, 1 thread"
    assert features(runtime, processor, paths[:1]).values.shape == (1, 32)
    with pytest.raises(ValueError, match="logits, no features"):
        features(open_runtime(classifier, "fused"), processor, paths[:1])


def test_features_that_are_not_finite_are_an_error(paths, processor):
    model = make(tiny())
    with torch.no_grad():
        model.layernorm.bias[3] = torch.inf
    with pytest.raises(FloatingPointError, match=r"00\.png"):
        features(model, processor, paths)
