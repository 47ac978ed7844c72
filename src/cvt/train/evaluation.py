"""Evaluation during a run, shared by its processes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from cvt.checkpoints import load_classifier
from cvt.data import Images, LabelledImages
from cvt.inference.evaluate import AnyEvaluation, evaluate, joined, write_evaluation
from cvt.inference.metrics import metric_text
from cvt.train.models import rebuilt
from cvt.train.progress import Progress
from cvt.train.recipe import DEFAULT_METRIC
from cvt.train.setup import Setup


def evaluate_shared(
    setup: Setup,
    model: Any,
    images: Images,
    after_image: Callable[[], None],
    interrupted: Callable[[], bool],
) -> AnyEvaluation:
    """Evaluate a model on every image once, each process on its share.

    Args:
        setup: what the run is built of.
        model: that is trained, or its average.
        images: to evaluate on.
        after_image: called after each image of this process.
        interrupted: whether to give up while a worker is stuck.

    Raises:
        cvt.data.workers.Interrupted: `interrupted` was true while no image came.
        FloatingPointError: the model's answer is not finite.
    """
    if setup.features and images is setup.splits.validation and isinstance(images, LabelledImages):
        return setup.features.evaluate(model, images, after_image)
    if setup.plan.world > 1:
        for buffer in model.buffers():  # the first process's, whose model is kept
            torch.distributed.broadcast(buffer, 0)
    keep = None
    is_kept = images is setup.splits.validation and isinstance(images, LabelledImages)
    if setup.cache and is_kept:
        assert isinstance(setup.splits.train, LabelledImages)
        keep = partial(setup.cache.get, first=len(setup.splits.train))
    share = evaluate(
        model,
        setup.processor,
        images,
        setup.plan.batch_size,
        setup.recipe.workers,
        after_image,
        rank=setup.plan.rank,
        world=setup.plan.world,
        max_pixels=setup.recipe.max_pixels,
        interrupted=interrupted,
        keep=keep,
    )
    return joined(gather_object([share]))


def evaluate_held_out(
    setup: Setup,
    evaluated: Callable[[Any, Images, str], AnyEvaluation],
    progress: Progress,
) -> None:
    """Evaluate the best model on the test split, if there is one, and write `test/`, once.

    Args:
        setup: what the run is built of.
        evaluated: evaluates a model on images, under a name.
        progress: receives the result.
    """
    if setup.splits.test is None:
        return
    folder = setup.output / "test"
    (is_known,) = broadcast_object_list([folder.exists()])
    if is_known:
        return
    best = load_classifier(setup.output / "best") if setup.is_main else None
    (config,) = broadcast_object_list([best and best.config.to_dict()])  # with its thresholds
    model: Any = best or rebuilt(config)
    model.to(setup.device)
    if setup.plan.world > 1:
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.data, 0)
    evaluation = evaluated(model, setup.splits.test, "test")
    if setup.is_main:
        write_evaluation(evaluation, folder, overwrite=True)
        usual = DEFAULT_METRIC[setup.recipe.problem]
        shown = dict.fromkeys((setup.recipe.metric, usual, "loss"))  # each once
        figures = ", ".join(metric_text(name, getattr(evaluation, name)) for name in shown)
        progress.log(f"{evaluation.images} held-out test images: {figures}; more in {folder}")
