"""Time, memory and disk of stage 1 as the number of comparisons grows.

Builds a source of N comparisons by repeating the rows of a parquet file in the hub's schema (by default the
demo's posts), runs both data scripts on it, each as a process, and prints one row of a table for each N.
Memory is the resident set of a script with all its children; disk is counted with temporary files.

    python benchmarks/data_scale.py
    python benchmarks/data_scale.py --rows train.parquet --reward_model NAME --sizes 23214 46429 92858
"""

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pyarrow as pa
from datasets import load_from_disk
from pyarrow import parquet
from pydantic import PositiveInt
from tqdm import tqdm

from pargs.cli import fail, parse_settings, setting
from pargs.processes import progress_bar

ROOT = Path(__file__).parents[1]
PAIRS, ENTRIES = "summarize_from_feedback", "summarize_from_feedback_partial"
NUM_VALIDATION = 1024
CARD = """---
configs:
- config_name: comparisons
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
---
"""


@dataclass
class Settings:
    rows: str = setting("", "Comparisons to repeat: a parquet file; the demo's posts if not given.")
    reward_model: str = setting(
        str(ROOT / "demo/models/full-reward-model"), "Its tokenizer makes the entries; hub name or folder."
    )
    sizes: list[PositiveInt] = setting([23214, 46429, 92858], "Numbers of training comparisons.")
    directory: str | None = setting(None, "Where to work, in a temporary folder that is removed.")


@dataclass
class Usage:
    """What one script took."""

    seconds: float
    cpu_seconds: float
    memory: int  # bytes
    disk: int  # bytes, at its peak


def read_rows(path: str, work: Path) -> pa.Table:
    """The comparisons of a parquet file, or new ones of the demo's world."""
    if not path:
        run(work, [ROOT / "demo/make_posts.py", "."])
        path = str(work / "openai/summarize_from_feedback/train.parquet")
    try:
        return parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        fail(f"cannot read the rows {path!r}: {error}")


def write_source(rows: pa.Table, count: int, work: Path) -> None:
    """`count` training comparisons, and a few for the other splits, laid out under the hub's names."""
    comparisons, test_posts = work / "openai/summarize_from_feedback", work / "CarperAI/openai_summarize_tldr"
    for folder in (comparisons, test_posts):
        folder.mkdir(parents=True, exist_ok=True)

    for split, size in (("train", count), ("validation", NUM_VALIDATION)):
        parquet.write_table(rows.take(np.arange(size) % len(rows)), comparisons / f"{split}.parquet")
    (comparisons / "README.md").write_text(CARD)

    test = [
        {"prompt": f"POST: {row['info']['post']}\nTL;DR:", "label": row["summaries"][0]["text"]}
        for row in rows.slice(0, 100).to_pylist()
    ]
    parquet.write_table(pa.Table.from_pylist(test), test_posts / "test.parquet")


def run(work: Path, command: list) -> Usage:
    """Run a script in `work` to its end and watch what it uses."""
    log, temporary = work / "log", work / "temporary"
    temporary.mkdir(exist_ok=True)
    before = disk_use(work)
    environment = os.environ | {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}

    start, cpu_start, memory, disk = time.perf_counter(), cpu_of_children(), 0, 0
    with log.open("w") as file:
        process = psutil.Popen(
            [sys.executable, *map(str, command)], cwd=work, env=environment, stdout=file, stderr=file
        )
        while process.poll() is None:
            memory, disk = max(memory, memory_use(process)), max(disk, disk_use(work) - before)
            time.sleep(0.25)
    if process.returncode:
        print(log.read_text()[-2000:], file=sys.stderr)
        fail(f"{command[0]} ended with {process.returncode}")
    return Usage(time.perf_counter() - start, cpu_of_children() - cpu_start, memory, disk)


def cpu_of_children() -> float:
    """Seconds of all cores that the scripts run so far have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_use(process: psutil.Process) -> int:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended meanwhile
    return total


def disk_use(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a temporary file
    return total


def measure(rows: pa.Table, count: int, reward_model: str, work: Path) -> str:
    """One row of the table."""
    write_source(rows, count, work)
    first = run(work, [ROOT / "DataProcess/tldr_data_process.py"])
    second = run(
        work,
        [
            ROOT / "DataProcess/tldr_data_process_partial.py",
            *("--reward_model", reward_model, "--num_comparisons", "0"),
            *("--num_validation_comparisons", str(NUM_VALIDATION)),
        ],
    )

    entries = len(load_from_disk(str(work / ENTRIES))["train"])
    pairs, prefixes = (disk_use(work / name) / 1e6 for name in (PAIRS, ENTRIES))
    return (
        f"| {count:,} | {first.seconds:.0f} + {second.seconds:.0f} "
        f"| {first.cpu_seconds:.0f} + {second.cpu_seconds:.0f} | {first.memory / 1e6:,.0f}, "
        f"{second.memory / 1e6:,.0f} | {pairs:,.0f} + {prefixes:,.0f} | "
        f"{first.disk / 1e6:,.0f}, {pairs + second.disk / 1e6:,.0f} | {entries:,} |"
    )


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    reward_model = settings.reward_model
    if Path(reward_model).is_dir():
        reward_model = str(Path(reward_model).resolve())  # the scripts run elsewhere

    with TemporaryDirectory(dir=settings.directory) as place:
        rows = read_rows(settings.rows, Path(place))
        print(
            "Pairs, then prefixes:\n\n| comparisons | seconds | CPU seconds | peak memory, MB | written, MB "
            "| peak disk with temporary files, MB | prefix pairs |\n|---|---|---|---|---|---|---|"
        )
        for count in progress_bar(settings.sizes, "sizes", "size"):
            tqdm.write(measure(rows, count, reward_model, Path(place)))


if __name__ == "__main__":
    main()
