"""A command of `cvt` that serves, in a process of its own."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 240  # gradio alone takes up to 20 on a busy machine


class Server:
    """The process, on a free port.

    Attributes:
        address: without a slash at the end.
        process: the process.
    """

    def __init__(self, command, arguments, log, settings=None):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (settings or {})
        words = [sys.executable, "-m", "cvt", command, *map(str, arguments), "--port", "0"]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        end = time.monotonic() + START_SECONDS
        while not (found := re.search(r"The \w+ is at (http://[^/\s]+)\S*\s", self.printed)):
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.1)
        self.address = found[1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def printed(self):
        return self.log.read_text("utf-8", errors="replace")

    @property
    def memory(self):
        """What the process occupies, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def stop(self, number=None):
        """End it by a signal, SIGTERM by default; returns the exit code."""
        self.process.send_signal(number) if number else self.process.terminate()
        return self.process.wait(60)
