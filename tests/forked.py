"""Run a stage's script in a process of its own, as `python script.py` does, without importing torch anew.

A fork server imports the libraries once; each run is a fork of it, so it can be killed like any process.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, Outcome

LIBRARIES = [
    "torch",
    "accelerate",
    "datasets",
    "pandas",
    "peft",
    "trl",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.deberta_v2.modeling_deberta_v2",
    "transformers.models.auto.modeling_auto",
]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


class Run:
    """A running script; what it prints goes to `log`."""

    def __init__(self, script: str, arguments: list, directory: Path, **environment: str):
        self.log = Path(directory).with_suffix(".log")
        self.log.write_text("")
        self.process = server.Process(
            target=run_script, args=(script, list(map(str, arguments)), directory, self.log, environment)
        )
        self.process.start()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Return once `condition` holds; the script must still run then, or have met it with its last act."""
        alive = True
        while not condition():
            assert alive, self.log.read_text()
            alive = self.process.is_alive()  # before the next look: what it does last counts
            time.sleep(0.005)

    def wait_for(self, text: str) -> None:
        """Return once the script has printed `text`."""
        self.wait_until(lambda: text in self.log.read_text())

    def kill_after(self, seconds: float) -> bool:
        """Send SIGKILL once `seconds` have passed; False if the script had ended by then."""
        self.process.join(seconds)
        ended = self.process.exitcode is not None
        self.process.kill()
        self.process.join()
        return not ended

    def finish(self) -> Outcome:
        self.process.join()
        return self.process.exitcode, self.log.read_text()


def run_script(script: str, arguments: list[str], directory: Path, log: Path, environment: dict) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment)
    os.chdir(directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it

    path = ROOT / script
    # A script finds the helpers beside it, as where python starts it, and those of no test or other stage.
    others = [entry for entry in sys.path if ROOT not in (Path(entry), Path(entry).parent)]
    sys.path[:] = [str(path.parent), *others]
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def run(script: str, arguments: list, directory: Path, **environment: str) -> Outcome:
    """Run a script to its end."""
    return Run(script, arguments, directory, **environment).finish()
