"""A disk that fills up: a tmpfs of a few kilobytes, mounted by root or in a user's own namespace."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run

# Mounts, says so, and holds the namespace until its standard input ends.
HOLD = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && cat'


@dataclass
class SmallDisk:
    """`path` is where the test finds its files; scripts see the disk as their working directory."""

    path: Path
    mounted_at: Path
    holder: subprocess.Popen | None = None  # of the namespace; None where root mounted it for everybody

    def run(self, script: str, arguments: list, **environment: str) -> tuple[int, str]:
        """Run a stage's script on the disk: exit status and output."""
        if self.holder is None:
            return run(script, arguments, self.path, **environment)

        enter = ["nsenter", "--preserve-credentials", "--user", "--mount", f"--target={self.holder.pid}"]
        done = subprocess.run(
            [*enter, f"--wd={self.mounted_at}", sys.executable, str(ROOT / script), *map(str, arguments)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def close(self) -> None:
        if self.holder is None:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        else:
            self.holder.communicate()


def mount(kilobytes: int, at: Path) -> SmallDisk:
    """An empty disk at the new folder `at`; skips the test where nobody lets us mount one."""
    at.mkdir()
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(at)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return SmallDisk(at, at)

    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("no small disk: neither root nor unshare")
    holder = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", HOLD, "sh", f"{kilobytes}k", str(at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if holder.stdout.readline() != "mounted\n":
        pytest.skip("no small disk: no mount as root, nor in a namespace of our own")
    return SmallDisk(Path(f"/proc/{holder.pid}/root{at}"), at, holder)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], SmallDisk]]:
    """Makes disks of so many kilobytes; they are gone after the test."""
    disks = []

    def make(kilobytes: int) -> SmallDisk:
        disks.append(mount(kilobytes, tmp_path / f"disk{len(disks)}"))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()
