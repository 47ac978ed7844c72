"""How many images, batches and steps a run has, and which of them are this process's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Numbers of images, batches and steps.

    Attributes:
        images: in one epoch.
        batch_size: images in a batch.
        accumulate: batches of a process in a step.
        rank: number of this process, from 0.
        world: number of processes.
        epochs: including those of the cool-down.
        only_steps: steps of the run, whatever its epochs.
    """

    images: int
    batch_size: int
    accumulate: int
    rank: int
    world: int
    epochs: int
    only_steps: int | None = None

    @property
    def batches_per_step(self) -> int:
        """Of all processes."""
        return self.accumulate * self.world

    @property
    def images_per_step(self) -> int:
        """Of all processes."""
        return self.batches_per_step * self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps; if an epoch has fewer images than a step, the step repeats images."""
        return max(1, self.images // self.images_per_step)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.only_steps or self.epochs * self.steps_per_epoch

    def epochs_in(self, steps: int) -> int:
        """Epochs in that many steps, an unfinished one included."""
        return -(-steps // self.steps_per_epoch)

    def batch_number(self, step: int, turn: int) -> int:
        """The number, in the whole run, of this process's batch in the given turn of a step."""
        return step * self.batches_per_step + turn * self.world + self.rank
