"""Kill runs at random moments and resume them: python kill_runs.py [RUNS] [KILLS EACH]."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.training_runs import Process, equal, kill_until_done, settings

from cvt.train.checkpointing import newest_checkpoint

if __name__ == "__main__":
    runs, kills = [*map(int, sys.argv[1:]), *(20, 10)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = settings(folder / "data", save_steps=1, workers=1)
        whole = Process([*words, "--output", str(folder / "whole")], folder / "whole.log")
        assert whole.exit_code() == 0, whole.printed
        for seed in range(runs):
            killed = folder / str(seed)
            steps, torn = kill_until_done(words, killed, kills, seed, at_most=1.0)
            equal(
                *(newest_checkpoint(run / "checkpoints")[1] for run in (folder / "whole", killed))
            )
            print(f"run {seed}: {kills} kills at {steps} steps, {torn} left a torn file; same end")
