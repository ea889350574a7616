"""Where an artifact comes from: the repository's commit, the libraries' versions, the date, the device."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "datasets", "accelerate")


def repository_commit() -> str | None:
    """The commit that runs, "... with changes" where files differ from it; None outside a git checkout."""
    try:
        commit = run_git("rev-parse", "HEAD")
        return commit + " with changes" * bool(run_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def run_git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def date_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
