"""Where a result comes from: the settings, models, code and machine that it was made with."""

import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from pydantic import BaseModel

PACKAGES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "numpy", "pandas")


class Origin(BaseModel):
    """What a file was made with."""

    settings: dict[str, Any]
    date: str  # UTC
    device: str | None = None  # where a model was asked
    commit: str | None  # of this repository; "-dirty" where files of it were changed
    versions: dict[str, str]

    @classmethod
    def of(cls, settings: Any, device: str | None = None) -> "Origin":
        """That of what a script with this settings dataclass writes now."""
        return cls(
            settings=asdict(settings),
            date=date_now(),
            device=device,
            commit=repository_commit(),
            versions=library_versions(),
        )


def date_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """The versions of Python and of each installed library that a number could depend on."""
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def repository_commit() -> str | None:
    """The commit of the code; None where it lies in no repository of its own, or there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def identify(name: str, config: Any) -> str | None:
    """What tells a model from a later one of the same name: a digest of its folder, or the hub's commit.

    `config` is its configuration; an adapter is one of its base.
    """
    identity = folder_digest(name) or getattr(config, "_commit_hash", None)
    base = folder_digest(getattr(config, "base_model_name_or_path", None) or "")
    return identity + base if identity and base else identity


def folder_digest(name: str) -> str | None:
    """A digest of a model's files, every byte of them; None for a hub name."""
    if not name or not Path(name).is_dir():
        return None
    seen = blake2b(digest_size=8)
    for path in sorted(Path(name).iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json"):
            continue
        seen.update(json.dumps([path.name, path.stat().st_size]).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                seen.update(block)
    return seen.hexdigest()
