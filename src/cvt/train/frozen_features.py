"""Training on the features of frozen stages, which are computed once for each view of an image.

With `head_only` or `freeze_stages`, the first stages give the same output whenever they see the
same view. So they run once, in their fused form, for each of `views` views of every training image
and for every validation image. Epoch after epoch, only the trained stages run then, on the stored
features; epoch e has view e mod `views`. View 0 is the image as in validation, since a random one
that never changes is only farther from what the model is for; the others are random.

The features are in `features/` of the run folder, so that a resumed run has the same ones. They are
deleted when the run is complete.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from cvt.data import Images, LabelledImages, StoredImage
from cvt.data.preprocessing import preprocessing_of
from cvt.data.workers import Interrupted
from cvt.files import staged
from cvt.inference.evaluate import AnyEvaluation, evaluation_of
from cvt.inference.predict import Result, reader
from cvt.runtime.fused import FusedCvt
from cvt.train.image_cache import ImageCache
from cvt.train.loader import Batch, Draw, Views, loaded, slots_of, training_views
from cvt.train.memory import free_disk
from cvt.train.models import frozen_stages
from cvt.train.plan import Plan
from cvt.train.recipe import Recipe
from cvt.views import to_tokens

FOLDER = "features"
DEFAULT_VIEWS = 3  # with head_only
LARGEST = 2**35  # bytes of the features of a run
VALIDATION = "validation"
WITHOUT = "a new run with views=0 keeps none"  # a run keeps its number of views


def chosen_views(recipe: Recipe, images: Images, world: int) -> int:
    """How many views of an image the frozen stages run for; 0 for a new view in every epoch.

    Raises:
        ValueError: the recipe asks for views where their features cannot be kept.
    """
    fault = ""
    if not isinstance(images, LabelledImages):
        fault = "the features of a stream cannot be looked up"
    elif world > 1:
        fault = f"features are kept by a run of one process, not of {world}"
    if recipe.views is None:
        sees_pixels = recipe.mixes or recipe.teacher
        return 0 if fault or sees_pixels or not recipe.head_only else DEFAULT_VIEWS
    if recipe.views and fault:
        raise ValueError(f"views = {recipe.views}: {fault}; {WITHOUT}")
    return recipe.views


class TrainedStages(nn.Module):
    """What is trained of a classifier: from the features of its frozen stages to the logits."""

    def __init__(self, model: Any, frozen: int) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, features: Tensor, return_dict: bool = True) -> ImageClassifierOutput:
        """Logits, (B, K), of features as `FusedCvt.features` returns them."""
        tokens, stages = features, self.model.cvt.encoder.stages[self.frozen :]
        for stage in stages:
            features, class_token, _ = stage(features, False)
            tokens = to_tokens(features) if class_token is None else class_token  # (B, N, C)
        logits = self.model.classifier(self.model.layernorm(tokens).mean(dim=1))
        return ImageClassifierOutput(logits=logits)


class FrozenFeatures:
    """The features of a run's images, computed when they are first needed.

    Args:
        output: the run folder.
        recipe: of the run; `views` is a number.
        plan: of the run.
        training: images to train on.
        model: the classifier, on the device on which its frozen stages are to run.
        augment: random changes of a training image.
        processor: the image processor of validation.
        interrupted: whether to give up while a worker is stuck.
        cache: of the training images, if the recipe has one.

    Attributes:
        frozen: how many stages are frozen.
        shape: of the features of an image.

    Raises:
        ValueError: the features take more space than is allowed or free.
    """

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        plan: Plan,
        training: LabelledImages,
        model: Any,
        augment: Callable[[Any], Tensor],
        processor: Any,
        interrupted: Callable[[], bool],
        cache: ImageCache | None = None,
    ) -> None:
        self.folder, self.recipe, self.plan = output / FOLDER, recipe, plan
        self.training, self.interrupted = training, interrupted
        self.frozen, self.device = frozen_stages(model, recipe), model.device
        self.stages = FusedCvt(model.config, model.state_dict(), torch.float32).to(self.device)
        size = recipe.image_size
        zeros = torch.zeros(1, model.config.num_channels, size, size, device=self.device)
        self.shape = tuple(self.stages.features(zeros, self.frozen).shape[1:])
        self.random_views = training_views(augment, recipe, cache)
        self.plain_views = Views(
            partial(preprocessed, preprocessing_of(processor)),
            reader(processor, exact=True, max_pixels=recipe.max_pixels),
        )
        self.opened: dict[str, tuple[np.ndarray, dict[int, str]]] = {}
        self._check_space()

    def _check_space(self) -> None:
        images, views = len(self.training), self.recipe.views or 0
        size = 4 * views * images * int(np.prod(self.shape))
        allowed = min(LARGEST, free_disk(self.folder) // 2)
        if size > allowed and not self.folder.exists():
            raise ValueError(
                f"views = {views}: the features of {images:,} images take {size / 2**30:.1f} GiB, "
                f"and may take {allowed / 2**30:.1f} GiB, at most half of the free disk; {WITHOUT}"
            )

    def views_in(self, epoch: int) -> list[int]:
        """The views that an epoch, counted from 0, has of every image."""
        repeats, views = self.recipe.repeats, self.recipe.views or 1
        return [(epoch * repeats + turn) % views for turn in range(repeats)]

    def compute_view(self, view: int, progress: Callable[[], Any]) -> None:
        """Compute the features of a view of the training images, if they are not there.

        Args:
            view: its number, from 0.
            progress: called after every image.

        Raises:
            FloatingPointError: a feature is not finite.
            Interrupted: the run is to stop; nothing is kept of the view.
        """
        views = self.random_views if view else self.plain_views
        seed = (self.recipe.seed, view)
        self._compute(f"view-{view}", self.training, seed, views, progress)

    def _compute(
        self,
        name: str,
        images: LabelledImages,
        seed: tuple[int, ...],
        views: Views,
        progress: Callable[[], Any],
    ) -> None:
        folder = self.folder / name
        if folder.exists():
            return
        with staged(folder) as beside:
            beside.mkdir()
            shape = (len(images), *self.shape)
            array = np.lib.format.open_memmap(beside / "features.npy", "w+", np.float32, shape)
            failures: dict[int, str] = {}
            draws = (Draw(images.sources[i], i, (*seed, i), i) for i in range(len(images)))
            batched = iter(lambda: list(islice(draws, self.plan.batch_size)), [])
            sent, kept = tee(batched)  # of a table, so the images of a few batches are in memory
            found = loaded(sent, views, self.recipe, self.interrupted)
            for batch, drawn in zip(found, kept, strict=True):
                read = batch.targets.tolist()
                if read:
                    array[read] = self._features(batch)
                for draw in drawn:
                    if draw.target not in read:
                        failures[draw.target] = batch.failures[str(draw.image)]
                    progress()
                if self.interrupted():
                    raise Interrupted
            array.flush()
            (beside / "failures.json").write_text(json.dumps(failures), "utf-8")

    def _features(self, batch: Batch) -> np.ndarray:
        pixels = batch.pixels.to(self.device)
        features = self.stages.features(pixels, self.frozen).cpu().numpy()
        if not np.isfinite(features).all():
            raise FloatingPointError("the output of the frozen stages is not finite")
        return features

    def _opened(self, name: str) -> tuple[np.ndarray, dict[int, str]]:
        """Features of the images, (N, ...), and why some could not be read."""
        if name not in self.opened:
            folder = self.folder / name
            failures = json.loads((folder / "failures.json").read_text("utf-8"))
            array = np.load(folder / "features.npy", mmap_mode="r")
            self.opened[name] = array, {int(i): error for i, error in failures.items()}
        return self.opened[name]

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches of features, (B, ...), from step `start` to the end of the run."""
        targets = self.training.targets
        for epoch, slots, indices in slots_of(self.training, self.recipe, self.plan, start):
            views = self.views_in(epoch)
            rows, read, failures = [], [], {}
            for slot, index in zip(slots, indices, strict=True):
                array, unread = self._opened(f"view-{views[slot % len(views)]}")
                if index in unread:
                    failures[str(self.training.sources[index])] = unread[index]
                else:
                    rows.append(array[index])
                    read.append(index)
            features = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0)
            yield Batch(features, torch.from_numpy(targets[read]), failures)

    def evaluate(
        self, model: Any, images: LabelledImages, progress: Callable[[], Any]
    ) -> AnyEvaluation:
        """Evaluate a model on the validation images.

        Args:
            model: that is trained, or its average.
            images: the validation images.
            progress: called after every image whose features are computed.

        Raises:
            FloatingPointError: the model's answer is not finite.
            Interrupted: as in `compute_view`.
        """
        self._compute(VALIDATION, images, (), self.plain_views, progress)
        results = self._results(model, images)
        pairs = zip(results, images.labels, strict=True)
        return evaluation_of(pairs, model.config, images.task)

    @torch.no_grad()
    def _results(self, model: Any, images: LabelledImages) -> Iterator[Result]:
        trained = TrainedStages(model, self.frozen).eval()
        features, failures = self._opened(VALIDATION)
        size = self.plan.batch_size
        for start in range(0, len(images), size):
            tensor = torch.tensor(features[start : start + size], device=self.device)
            rows = trained(tensor).logits.float().cpu().numpy()
            for i, logits in enumerate(rows, start):
                source = StoredImage(images.name(i), partial(_content, images, i))
                error = failures.get(i)
                yield Result(source, error=error) if error else Result(source, logits)

    def delete(self) -> None:
        """Delete the features of a complete run."""
        self.opened.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _content(images: LabelledImages, index: int) -> Any:
    """What is in an image: of a table, reading it takes time, and few are drawn."""
    source = images.sources[index]
    return source.content if isinstance(source, StoredImage) else source.read_bytes()


def preprocessed(preprocessing: Any, image: Image.Image) -> Tensor:
    """An image as validation has it, (3, H, W)."""
    return torch.from_numpy(preprocessing([image])[0])
