"""Train on a disk too small for the run, as root, on a tmpfs of every size: python full_disk.py."""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.training_runs import Process, settings

from cvt.train.checkpointing import checkpoints, newest_checkpoint

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name, "disk")
        disk.mkdir()
        words = settings(folder / "data", save_steps=2)
        for kilobytes in range(1000, 5000, 250):
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], check=True
            )
            try:
                run, log = disk / "run", folder / f"{kilobytes}.log"
                code = Process([*words, "--output", str(run)], log).exit_code()
                last = log.read_text().splitlines()[-1]
                saved = checkpoints(run / "checkpoints")
                step = newest_checkpoint(run / "checkpoints")[1]["step"] if saved else None
                hidden = [str(path.relative_to(run)) for path in run.rglob(".*")]
                print(f"{kilobytes} kB: exit {code}, newest {step}, left over {hidden}: {last}")
                assert code == 0 or (code == 1 and last.startswith("Error: ")), log.read_text()
            finally:
                subprocess.run(["umount", disk], check=True)
