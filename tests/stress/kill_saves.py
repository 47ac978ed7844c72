"""Kill a process that saves checkpoints, at random moments: python kill_saves.py [KILLS] [SEED]."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.training_runs import kill_during_saves

if __name__ == "__main__":
    kills, seed = [*map(int, sys.argv[1:]), *(1000, 0)[len(sys.argv) - 1 :]]
    for keep in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torn, saves = kill_during_saves(Path(folder, "checkpoints"), kills, keep, seed)
        print(f"keep={keep}: {kills} kills, {torn} of them in a save; {saves} saves, none lost")
