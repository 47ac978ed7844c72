"""A search over the settings of a recipe, by Optuna: each trial is a run folder."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cvt.files import check_path, is_occupied, locked, staged
from cvt.inference.metrics import metric_text
from cvt.libraries import quiet, require
from cvt.train.best_epoch import quality, result
from cvt.train.callbacks import Callback, RunState
from cvt.train.checkpointing import checkpoints
from cvt.train.progress import NullProgress, Progress
from cvt.train.recipe import (
    FIELDS,
    LOWER_IS_BETTER,
    Recipe,
    checked,
    load_recipe,
    read_settings,
    value_type,
)
from cvt.train.setup import splits_for
from cvt.train.strict_yaml import write_yaml
from cvt.train.tracking import require_trackers
from cvt.train.trainer import resume as resume_run
from cvt.train.trainer import train

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STUDY, NAME = "study.db", "cvt"  # Optuna's file in the output folder, and the study in it
SHARED = ("Data", "Run")  # groups of settings that all trials share: else none could be compared
Space = dict[str, "BaseDistribution"]
DRAWS = 100  # of settings, until some have not been tried
EPOCHS_BEFORE_PRUNING = 2  # the learning rate is still rising in the first


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: from 0, as in Optuna and in the name of its folder.
        state: `complete`; `pruned`, if it was ended since others were better; or `failed`.
        value: of the metric, in its best epoch; None if it failed.
        epoch: its best epoch; None if it failed.
        settings: of the search.
        folder: of the run.
        error: why it failed; else empty.

    Example:
        >>> from pathlib import Path
        >>> from cvt.train import Trial
        >>> trial = Trial(0, "complete", 0.94, 3, {"lr": 1e-3}, Path("runs/tune/trial-0000"))
        >>> trial.settings["lr"]
        0.001
    """

    number: int
    state: str
    value: float | None
    epoch: int | None
    settings: Mapping[str, Any]
    folder: Path
    error: str = ""


def tune(
    recipe: Recipe,
    search: Mapping[str, str],
    output: str | Path,
    trials: int = 20,
    *,
    resume: bool = False,
    prune: bool = True,
    progress: Progress | None = None,
) -> list[Trial]:
    """Search for the settings with which a recipe gets its best `metric`.

    The output folder gets a run folder for each trial, `trials.csv`, `best.yaml` with the recipe of
    the best trial, and `study.db`, which other tools of Optuna open. What is tried next follows
    from the recipe's seed and from the trials that ended. So a search that is interrupted and
    resumed tries the same as one that was not, and the run that was interrupted resumes exactly.

    Args:
        recipe: of all trials, but for the settings of the search.
        search: for each setting, `LOW..HIGH` of numbers, `LOW..HIGH:log` of numbers that differ by
            their order of magnitude, or values with commas between.
        output: folder of the search.
        trials: how many there shall be in the whole, failed ones and those before a resume too.
        resume: resume the search in `output`, or start it if there is none.
        prune: end a trial after an epoch, from the second on, up to which the best value is below
            the median of the trials before, once there are five.
        progress: receives the progress.

    Returns:
        The trials, the best first; then those that were pruned, then those that failed.

    Raises:
        FileExistsError: `output` exists already.
        ImportError: Optuna is not installed.
        OSError: as `train`.
        ValueError: a setting cannot be searched like this, the recipe has folds, the search in
            `output` is another one, or all trials failed; else as `train`.
        Stopped: as `train`.

    Example:
        >>> from cvt.train import load_recipe, tune
        >>> recipe = load_recipe("digits", {"steps": 2, "workers": 0})
        >>> best, *others = tune(recipe, {"lr": "1e-4..1e-2:log"}, "runs/search", trials=2)
        >>> best.value >= others[0].value
        True
    """
    require("a search", "optuna", extra="tune")
    require_trackers(recipe)
    check_path(output, "output")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a search runs in one process: start it without torchrun")
    if recipe.folds and not recipe.fold:
        raise ValueError(f"folds = {recipe.folds}: a trial is one run; fold chooses one of them")
    output, bars = Path(output), progress or NullProgress()
    space = search_space(search)
    has_study = (output / STUDY).exists()
    if has_study and not resume:
        raise FileExistsError(f"{output} exists already; --resume resumes the search in it")
    if not has_study and is_occupied(output):
        raise FileExistsError(f"{output} exists already, with no search to resume; take another")
    splits_for(recipe)  # what is wrong with the data is raised before anything is written
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        study = _open_study(output, recipe, search)
        while True:
            ended = _trials(study, output)
            number = len(ended)
            if ended:
                _write(ended, recipe, output)
                bars.log(f"trial {number - 1} {_outcome(ended[-1], recipe.metric)}")
            if number >= trials:
                break
            trial = _next_trial(study, space, recipe.seed, prune)
            if trial is None:
                bars.log(f"ended after {number} trials: all settings seem to be tried")
                break
            words = "  ".join(f"{name}={shown(value)}" for name, value in trial.params.items())
            bars.log(f"trial {number} of {trials}: {words}")
            study.add_trial(_run(trial, recipe, space, _folder(output, number), progress))
    found = _ranked(ended, recipe.metric)
    if found[0].value is None:
        raise ValueError(f"all {len(found)} trials failed; the first: {found[0].error}")
    return found


# ------------------------------------------------------------------------------ search space


def search_space(search: Mapping[str, str]) -> Space:
    """Optuna's distributions of the settings of a search.

    Args:
        search: as in `tune`.

    Raises:
        ValueError: there is no such setting, it may not be searched, or values are not legal; lists
            all of them.
    """
    if not search:
        raise ValueError("search: give at least one setting, as lr=1e-5..1e-3:log")
    read_settings(None, dict.fromkeys(search))  # refuses unknown names
    space: Space = {}
    faults, group = [], ""
    for name, spec in FIELDS.items():
        group = spec.metadata["group"] or group
        if name in search:
            try:
                if group in SHARED:
                    raise ValueError(f"{name}: is the same in all trials, as all of {group} is")
                space[name] = _distribution(spec, search[name])
            except ValueError as error:
                faults.append(f"search {error}")
    if faults:
        raise ValueError("\n".join(faults))
    return space


def _distribution(spec: Field, text: str) -> "BaseDistribution":
    from optuna import distributions

    name, kind = spec.name, value_type(spec).type
    if ".." not in text or kind not in (int, float):
        words = [word.strip() for word in text.split(",")]
        values = [checked(spec, read_settings(None, {name: word})[name]) for word in words]
        if len(set(values)) < len(values) or len(values) < 2:
            raise ValueError(f"{name} = {text}: needs at least two values, each once")
        return distributions.CategoricalDistribution(values)
    start, _, rest = text.partition("..")
    end, colon, scale = rest.partition(":")
    if colon and scale != "log":
        raise ValueError(f"{name} = {text}: after the colon, there is only log")
    low, high = checked(spec, start), checked(spec, end)
    if isinstance(low, str) or isinstance(high, str) or low >= high or (colon and low <= 0):
        raise ValueError(
            f"{name} = {text}: must be LOW..HIGH, HIGH above LOW, and with :log both above 0"
        )
    if kind is int:
        return distributions.IntDistribution(low, high, log=bool(colon))
    return distributions.FloatDistribution(low, high, log=bool(colon))


# ------------------------------------------------------------------------------ study


def _open_study(output: Path, recipe: Recipe, search: Mapping[str, str]) -> "optuna.Study":
    """The study in a folder, or a new one.

    Raises:
        ValueError: its recipe or its search is another.
    """
    import optuna
    from sqlalchemy import URL

    url = URL.create("sqlite", database=str(output / STUDY)).render_as_string()
    direction = "MINIMIZE" if recipe.metric in LOWER_IS_BETTER else "MAXIMIZE"
    with quiet("optuna", "alembic"):
        study = optuna.create_study(
            storage=url,
            study_name=NAME,
            direction=optuna.study.StudyDirection[direction],
            load_if_exists=True,
        )
    given = {"search": dict(search), "recipe": asdict(recipe)}
    if "recipe" not in study.user_attrs:
        for name, settings in given.items():
            study.set_user_attr(name, settings)
    known = dict(study.user_attrs)
    known["recipe"] = asdict(load_recipe(None, known["recipe"]))  # older ones lack settings
    for name, settings in given.items():
        before = known[name]
        if keys := sorted(k for k in before | settings if before.get(k) != settings.get(k)):
            raise ValueError(f"{output} is a search with another {name}: {', '.join(keys)} differ")
    return study


def _next_trial(
    study: "optuna.Study",
    space: Space,
    seed: int,
    prune: bool,
) -> "optuna.Trial | None":
    """A trial with settings that were not tried, in a copy of the study; None if none are found.

    The study itself gets the trials that ended. A sampler has no memory but the study: it is seeded
    by the number of the trial.
    """
    import optuna

    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if prune:
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=EPOCHS_BEFORE_PRUNING)
    with quiet("optuna"):
        copy = optuna.create_study(direction=study.direction, pruner=pruner)
    copy.add_trials(study.trials)
    tried = [trial.params for trial in study.trials]
    for draw in range(DRAWS):
        (drawn,) = np.random.SeedSequence((seed, len(tried), draw)).generate_state(1)
        copy.sampler = optuna.samplers.TPESampler(seed=int(drawn))
        trial = copy.ask(space)
        if trial.params not in tried:
            return trial
    return None


class _Pruning(Callback):
    """Reports the epochs of a run to its trial, and ends the run where that is to be pruned."""

    def __init__(self, trial: "optuna.Trial", metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.values: dict[int, float] = {}  # by epoch
        self.is_pruned = False

    def on_train_begin(self, run: RunState) -> None:
        for row in run.history:
            self._report(row, run)

    def on_epoch_end(self, run: RunState) -> None:
        self._report(run.metrics, run)

    def _report(self, row: Mapping[str, float | None], run: RunState) -> None:
        value, epoch, step = result(row, self.metric), row["epoch"], row["step"]
        if value is None or epoch is None or step is None or self.is_pruned:
            return
        self.values[int(epoch)] = value
        self.trial.report(value, int(epoch))
        if step < run.steps and self.trial.should_prune():
            self.is_pruned = True
            run.stop("the trials before were better")


def _run(
    trial: "optuna.Trial",
    recipe: Recipe,
    space: Space,
    folder: Path,
    progress: Progress | None,
) -> "optuna.trial.FrozenTrial":
    """Train with the settings of a trial, or resume that; returns the trial as it ended.

    Settings that exclude each other, or do not fit the data, fail the trial. What is refused once
    there is a checkpoint is no fault of the settings, and is raised.
    """
    from optuna.trial import TrialState, create_trial

    pruning = _Pruning(trial, recipe.metric)
    value, state = None, TrialState.FAIL
    attributes: dict[str, Any]
    try:
        if checkpoints(folder / "checkpoints"):
            row = resume_run(folder, trial.params, progress, [pruning])
        else:
            row = train(_chosen(recipe, trial.params), folder, progress, [pruning])
    except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        if isinstance(error, ValueError) and checkpoints(folder / "checkpoints"):
            raise
        attributes = {"error": str(error)}
    else:
        attributes = {"epoch": row["epoch"]}
        value = result(row, recipe.metric)
        state = TrialState.PRUNED if pruning.is_pruned else TrialState.COMPLETE
    return create_trial(
        state=state,
        value=value,
        params=trial.params,
        distributions=space,
        user_attrs=attributes,
        intermediate_values=pruning.values,
    )


def _chosen(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    return Recipe(**{**asdict(recipe), **settings})


# ------------------------------------------------------------------------------ results


def _folder(output: Path, number: int) -> Path:
    return output / f"trial-{number:04d}"


def _trials(study: "optuna.Study", output: Path) -> list[Trial]:
    return [
        Trial(
            number=trial.number,
            state={"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
            value=trial.value,
            epoch=trial.user_attrs.get("epoch"),
            settings=trial.params,
            folder=_folder(output, trial.number),
            error=trial.user_attrs.get("error", ""),
        )
        for trial in study.trials
    ]


def _ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The best first, then pruned ones, then failed ones."""
    states = ("complete", "pruned", "failed")

    def order(trial: Trial) -> tuple[int, float]:
        return states.index(trial.state), -quality(metric, trial.value or 0)

    return sorted(trials, key=order)


def _write(trials: Sequence[Trial], recipe: Recipe, output: Path) -> None:
    """Write `trials.csv`, and `best.yaml` if a trial has not failed."""
    with (
        staged(output / "trials.csv", overwrite=True) as path,
        open(path, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        names = list(trials[0].settings)
        writer.writerow(["trial", "state", recipe.metric, "epoch", *names, "folder", "error"])
        for trial in trials:
            settings = [trial.settings[name] for name in names]
            row = [trial.number, trial.state, trial.value, trial.epoch, *settings]
            writer.writerow([*row, trial.folder.name, trial.error])
    best = _ranked(trials, recipe.metric)[0]
    if best.value is not None:
        value = metric_text(recipe.metric, best.value)
        with staged(output / "best.yaml", overwrite=True) as path:
            text = write_yaml(asdict(_chosen(recipe, best.settings)))
            path.write_text(f"# trial {best.number}: {value}\n{text}", "utf-8")


def _outcome(trial: Trial, metric: str) -> str:
    if trial.value is None:
        return f"failed: {trial.error}"
    return f"{trial.state}: {metric_text(metric, trial.value)}, after epoch {trial.epoch}"


def shown(value: Any) -> str:
    """A value of a setting, for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
