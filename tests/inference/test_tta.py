import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from cvt import Classifier, image_processor
from cvt.data import open_labelled
from cvt.export import export
from cvt.inference.evaluate import evaluate
from cvt.inference.predict import classify, mean_of_views, scores
from cvt.runtime import open_runtime


@pytest.fixture(scope="module")
def runtimes(model_folder, tmp_path_factory):
    """The small classifier in every engine."""
    folder = tmp_path_factory.mktemp("exports")
    for to in ("onnx", "openvino"):
        export(model_folder, folder / to, to)
    names = {"torch": model_folder, "fused": model_folder} | {
        engine: folder / to for to, engine in (("onnx", "onnxruntime"), ("openvino", "openvino"))
    }
    return {name: open_runtime(path, name) for name, path in names.items()}


def views(path, tta):
    """The views of an image, by torchvision, of the processor of `model_folder`."""
    with Image.open(path) as image:
        width, height = image.size
        short = int(32 / 0.875)
        size = (short * height // min(image.size), short * width // min(image.size))
        mode = functional.InterpolationMode.BICUBIC
        resized = functional.resize(image.convert("RGB"), size, mode)
    top, left = ((side - 32) // 2 for side in size)  # torchvision's own rounds
    centre = functional.crop(resized, top, left, 32, 32)
    if tta == "flip":
        return [centre, functional.hflip(centre)]
    return [centre, *functional.five_crop(resized, 32)[:4]]


def expected(model, processor, path, tta):
    """The mean of the scores of the views, one by one."""
    normalise = partial(functional.normalize, mean=processor.image_mean, std=processor.image_std)
    with torch.no_grad():
        pixels = [normalise(functional.to_tensor(view))[None] for view in views(path, tta)]
        return sum(model(each).logits.softmax(1) for each in pixels)[0].numpy() / len(pixels)


@pytest.mark.parametrize("tta", ["flip", "five-crop"])
@pytest.mark.parametrize("runtime", ["torch", "fused", "onnxruntime", "openvino"])
def test_scores_are_the_mean_over_the_views(
    runtimes, classifier, processor, photos, runtime, tta, monkeypatch
):
    paths = sorted((photos / "red").glob("*.png"))[:5]
    batches, run = [], runtimes[runtime]._run
    monkeypatch.setattr(
        runtimes[runtime], "_run", lambda pixels: batches.append(len(pixels)) or run(pixels)
    )
    results = list(classify(runtimes[runtime], processor, paths, batch_size=3, tta=tta))
    assert sum(batches) == 5 * (2 if tta == "flip" else 5)
    assert runtime != "torch" or len(batches) == 2  # all views of a batch at once
    for result in results:
        wanted = expected(classifier, processor, result.path, tta)
        found = scores(result.logits, classifier.config)
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        plain = next(classify(classifier, processor, [result.path])).logits
        assert not np.allclose(found, scores(plain, classifier.config), atol=1e-4)


def test_workers_and_unreadable_images_change_nothing(classifier, processor, photos, tmp_path):
    paths = sorted((photos / "blue").glob("*.png"))[:6]
    (tmp_path / "broken.png").write_bytes(b"none")
    paths.insert(1, tmp_path / "broken.png")
    found = [
        list(classify(classifier, processor, paths, 2, workers, tta="five-crop"))
        for workers in (0, 2)
    ]
    for one, other in zip(*found, strict=True):
        assert one.error == other.error
        np.testing.assert_array_equal(one.logits, other.logits)


def test_an_evaluation_is_that_of_the_mean_scores(classifier, processor, photos):
    images = open_labelled(photos)
    result = evaluate(classifier, processor, images, tta="flip")
    rows = [expected(classifier, processor, source, "flip") for source in images.sources]
    true = [classifier.config.class_names.index(label) for label in images.labels]
    right = np.mean([row.argmax() == label for row, label in zip(rows, true, strict=True)])
    loss = -np.mean([np.log(row[label]) for row, label in zip(rows, true, strict=True)])
    assert (result.top1, result.loss) == pytest.approx((right, loss), abs=1e-4)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression", None])
def test_the_mean_is_of_scores_of_every_kind_also_of_extreme_ones(classifier, kind, monkeypatch):
    monkeypatch.setattr(classifier.config, "problem_type", kind)
    logits = np.float32(np.random.default_rng(0).normal(0, 5, (5, 7, 3)))
    logits[0, 0], logits[:, 1] = [900, -900, 0], [500, -500, 0]
    found = mean_of_views(logits, classifier.config)
    assert np.isfinite(found).all()
    assert found.dtype == np.float32
    for i, row in enumerate(found):
        with np.errstate(over="ignore"):  # of the sigmoid of -900
            wanted = np.mean([scores(view[i], classifier.config) for view in logits], axis=0)
            np.testing.assert_allclose(scores(row, classifier.config), wanted, rtol=1e-4, atol=1e-7)


def test_what_has_no_crops_is_refused(model_folder, classifier, processor):
    with pytest.raises(ValueError, match="tta = mirror: must be one of flip, five-crop"):
        Classifier(classifier, processor=processor, tta="mirror")
    whole = image_processor(classifier.config, image_size=384)
    with pytest.raises(ValueError, match="five-crop: from 384 pixels on"):
        Classifier(classifier, processor=whole, tta="five-crop")
    as_they_are = image_processor(classifier.config, image_size=32, do_resize=False)
    with pytest.raises(ValueError, match="five-crop: the model's image processor does not crop"):
        Classifier(classifier, processor=as_they_are, tta="five-crop")


def test_the_commands_and_the_class_agree(cvt, model_folder, photos, classifier, processor):
    path = photos / "green/05.png"
    wanted = expected(classifier, processor, path, "five-crop").max()
    _, out, _ = cvt("predict", model_folder, path, "--tta", "five-crop", "--topk", 1, "--json")
    (found,) = json.loads(out)["predictions"]
    assert found["score"] == pytest.approx(wanted, abs=2e-5)
    model = Classifier(model_folder, tta="five-crop")
    assert model(path, top_k=1) == [{"label": found["label"], "score": pytest.approx(wanted, 1e-4)}]
    _, plain, _ = cvt("evaluate", model_folder, photos)
    _, flipped, _ = cvt("evaluate", model_folder, photos, "--tta", "flip")
    assert plain.splitlines()[-1] != flipped.splitlines()[-1]
