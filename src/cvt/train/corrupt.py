"""Images of a run that cannot be used: reported once each, listed in a file, limited in number."""

from pathlib import Path

from accelerate.utils import gather_object

from cvt.data import LabelledImages, Splits, oversized
from cvt.train.plan import Plan
from cvt.train.progress import Progress
from cvt.train.recipe import Recipe
from cvt.train.run_folder import CORRUPT, write_corrupt

ALWAYS_ALLOWED = 10  # images, however few the data has


def report_oversized(splits: Splits, recipe: Recipe, plan: Plan, progress: Progress) -> None:
    """Report the images with more pixels than are decoded; each process checks its share."""
    for name, images in (("training", splits.train), ("validation", splits.validation)):
        if isinstance(images, LabelledImages):
            share = list(oversized(images, recipe.max_pixels, plan.rank, plan.world))
            for fault in gather_object(share):
                progress.log(f"not used in {name}: {fault}")


class CorruptImages:
    """The training images that could not be decoded, over all processes.

    Args:
        found: errors by the name of the image, from a checkpoint.
        recipe: of the run.
        images: in an epoch.
        output: the run folder.
        progress: receives a line for each of them.
    """

    def __init__(
        self, found: dict[str, str], recipe: Recipe, images: int, output: Path, progress: Progress
    ) -> None:
        self.found, self.recipe, self.images = found, recipe, images
        self.output, self.progress = output, progress

    def add(self, failures: dict[str, str], write: bool) -> None:
        """Add those of a step. All processes call this in the same steps.

        Args:
            failures: errors of this process's images, by their path.
            write: whether this process writes the list.

        Raises:
            ValueError: they are more than `max_corrupt` allows.
        """
        data = Path(self.recipe.data)
        folder = str(data if data.is_dir() else data.parent)
        for path, error in gather_object(list(failures.items())):
            name = path.removeprefix(folder).lstrip("/")  # the same if the data is moved
            if name not in self.found:
                self.found[name] = error
                self.progress.log(f"skipped: {error}")
        if write:
            write_corrupt(self.output, self.found)
        if len(self.found) > max(ALWAYS_ALLOWED, self.recipe.max_corrupt * self.images):
            raise ValueError(
                f"{len(self.found)} of {self.images} training images cannot be read, more than "
                f"max_corrupt = {self.recipe.max_corrupt:g} and more than {ALWAYS_ALLOWED}; "
                f"{self.output / CORRUPT} lists them"
            )
