import shutil
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image

from cvt import CvtForImageClassification, fuse
from cvt.checkpoints import load_classifier, load_processor
from cvt.data import huggingface, open_training
from cvt.inference.evaluate import evaluate
from cvt.train import Callback, frozen_features, resume, train
from cvt.train.frozen_features import TrainedStages, chosen_views
from cvt.train.trainer import Stopped

# Views without anything random: then a new view in every epoch is the one that was kept.
FIXED = {"crop_scale": 1.0, "crop_ratio": 1.0, "flip": 0, "crop_pct": 1.0}


@pytest.mark.parametrize("cls_token", [[False, False, True], [False] * 3, [True] * 3], ids=str)
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_the_trained_stages_continue_where_the_frozen_ones_end(config_folder, cls_token, frozen):
    config = CvtForImageClassification.config_class.from_pretrained(
        config_folder, cls_token=cls_token
    )
    model = CvtForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 40, 32)
    features = fuse(model).features(pixels, frozen)
    with torch.no_grad():
        logits = TrainedStages(model, frozen)(features).logits
        torch.testing.assert_close(logits, model(pixels).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [{"head_only": True}, {"freeze_stages": 2}], ids=str)
def test_training_on_features_is_training_on_the_images(recipe, square_photos, tmp_path, frozen):
    found = []
    for views in (0, 1):
        changes = {"data": str(square_photos), "drop_path": 0.0, "drop_rate": 0.0}
        run = tmp_path / str(views)
        best = train(recipe(views=views, **changes, **FIXED, **frozen), run)
        found.append((best, final_state(run)["model"]))
    (best, weights), (best_kept, kept) = found
    assert best_kept == pytest.approx(best, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(kept[name], weight, atol=1e-4, rtol=1e-3)


@pytest.fixture
def square_photos(photos, tmp_path):
    """The photos as squares: their crop is the whole image."""
    shutil.copytree(photos, tmp_path / "square")
    for path in (tmp_path / "square").rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    return tmp_path / "square"


def test_views_differ_and_follow_each_other(recipe, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(recipe(epochs=4, head_only=True, views=2), run, Watcher(stop_after=10))
    arrays = [np.load(run / f"features/view-{view}/features.npy") for view in (0, 1)]
    assert [array.shape for array in arrays] == [(30, 1, 32)] * 2
    assert not np.isclose(arrays[0], arrays[1]).all(axis=(1, 2)).any()
    assert np.load(run / "features/validation/features.npy").shape == (6, 1, 32)
    resume(run)
    assert not (run / "features").exists()


def test_the_first_view_is_that_of_validation(recipe, photos, tmp_path):
    settings = {"data": str(photos), "val_data": str(photos), "crop_scale": 0.1, "workers": 1}
    with pytest.raises(Stopped):
        train(recipe(head_only=True, views=2, **settings), tmp_path / "run", Watcher(stop_after=10))
    files = (f"features/{name}/features.npy" for name in ("view-0", "view-1", "validation"))
    first, second, held_out = (np.load(tmp_path / "run" / file) for file in files)
    np.testing.assert_allclose(first, held_out, atol=1e-5)
    assert not np.isclose(first, second).all(axis=(1, 2)).any()


@pytest.mark.parametrize("during", ["epoch", "frozen stages", "validation"])
@pytest.mark.parametrize("frozen", [{"head_only": True}, {"freeze_stages": 1}], ids=str)
def test_a_run_on_kept_features_resumes_to_the_bit(recipe, tmp_path, frozen, during):
    settings = recipe(epochs=3, save_steps=2, views=2, repeats=2, ema_decay=0.8, **frozen)
    train(settings, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for begin in (partial(train, settings, stopped), partial(resume, stopped)):
        with pytest.raises(Stopped):
            begin(progress=Watcher(stop_after=2, during=during))
    resume(stopped)
    equal(final_state(tmp_path / "whole"), final_state(stopped))


class StopAfterAStep(Callback):
    def on_step_end(self, run):
        run.stop("enough")


@pytest.mark.parametrize("how", ["stopped", "ended"])
def test_a_resumed_run_computes_the_features_with_the_weights_of_its_start(recipe, tmp_path, how):
    """Stopped, it lacks view 1 and the validation; ended early, it has deleted all features."""
    train(recipe(epochs=1, seed=5), tmp_path / "start")
    settings = recipe(model=str(tmp_path / "start/best"), epochs=2, head_only=True, views=2)
    train(settings, tmp_path / "whole")
    again = tmp_path / "again"
    if how == "stopped":
        with pytest.raises(Stopped):
            train(settings, again, Watcher(stop_after=2))
    else:
        train(settings, again, callbacks=[StopAfterAStep()])
    resume(again)
    equal(final_state(tmp_path / "whole"), final_state(again))


def test_statistics_of_frozen_norms_do_not_move(recipe, tmp_path):
    train(recipe(epochs=2, freeze_stages=2, views=1, keep=9), tmp_path / "run")
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    first, last = (
        torch.load(path / "state.pt", weights_only=True)["model"] for path in (saved[0], saved[-1])
    )
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert any(name.endswith("running_mean") for name in moved)
    assert all("stages.2" in name for name in moved if name.startswith("cvt."))


def test_the_validation_is_that_of_the_model(recipe, tmp_path):
    best = train(recipe(epochs=2, head_only=True), tmp_path / "run")
    model = load_classifier(tmp_path / "run/best")
    _, held_out, _ = open_training(recipe().data)
    plain = evaluate(model, load_processor(tmp_path / "run/best", model.config), held_out)
    assert (plain.top1, plain.loss) == pytest.approx((best["val_top1"], best["val_loss"]), abs=1e-5)


def test_images_that_cannot_be_read_are_skipped_and_reported(recipe, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    broken = sorted((tmp_path / "photos").rglob("*.png"))[::6]
    for path in broken:
        path.write_bytes(b"no image: " + path.name.encode() + path.parent.name.encode())
    watcher = Watcher()
    settings = recipe(data=str(tmp_path / "photos"), head_only=True, views=1, workers=2)
    train(settings, tmp_path / "run", watcher)
    skipped = {line for line in watcher.lines if line.startswith("skipped: ")}
    assert 0 < len(skipped) < len(broken)  # some validate
    assert len((tmp_path / "run/corrupt.txt").read_text().splitlines()) == len(skipped)


def test_by_default_a_head_is_trained_on_three_views_unless_batches_are_mixed(recipe, tmp_path):
    for changes, expected in (
        ({"head_only": True}, "3 views"),
        ({"head_only": True, "mixup": 0.2}, "mixup=0 cutmix=0"),
        ({"freeze_stages": 1}, ""),
    ):
        watcher = Watcher()
        train(recipe(epochs=1, **changes), tmp_path / f"run{len(changes)}{expected[:1]}", watcher)
        log = [line for line in watcher.lines if "frozen stages" in line]
        assert (expected in log[0]) if expected else not log


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"views": 2}, "views = 2: needs frozen stages"),
        ({"views": 2, "head_only": True, "cutmix": 1.0}, "views = 2: mixup and cutmix"),
    ],
)
def test_views_need_frozen_stages_and_plain_batches(recipe, changes, fault):
    with pytest.raises(ValueError, match=fault):
        recipe(**changes)


def test_of_a_table_images_are_read_once_for_their_features(recipe, photos, tmp_path, monkeypatch):
    paths = sorted(photos.rglob("*.png"))
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    rows["label"] = [path.parent.name for path in paths]
    features = Features({"image": ImageFeature(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
    reads, read = [], huggingface._Rows.__getitem__

    def counted(self, index):
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(huggingface._Rows, "__getitem__", counted)
    counts = []

    class Count(Callback):
        def on_train_begin(self, run):
            counts.append(len(reads))

        def on_epoch_end(self, run):
            counts.append(len(reads))

    settings = {"data": str(tmp_path / "table.parquet"), "head_only": True, "views": 1}
    train(recipe(**settings), tmp_path / "run", callbacks=[Count()])
    assert np.diff(counts).tolist() == [36, 0, 0]


def test_several_processes_keep_no_features_and_a_resumed_run_is_no_other(recipe, photos):
    images, _, _ = open_training(photos)
    with pytest.raises(ValueError, match="2; a new run with views=0 keeps none"):
        chosen_views(recipe(head_only=True, views=3), images, world=2)
    assert chosen_views(recipe(head_only=True), images, world=2) == 0


def test_features_may_not_fill_the_disk(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_features, "LARGEST", 1000)
    with pytest.raises(ValueError, match="views = 2: the features of 30 images take"):
        train(recipe(head_only=True, views=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
