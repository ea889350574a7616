"""What a decoding run has finished, kept as it goes: a run that was killed goes on from there.

One file for each method and process, `generation_args.progress-0.jsonl`: a line for each finished response
and one for its reward, flushed at once. Both belong to their prompt alone, so it does not matter which
process, or which of several runs, wrote them.
"""

import json
import os
from hashlib import blake2b
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from script_settings import fail


class Progress:
    """Append-only records of one part of the work; each process writes a file of its own and knows all.

    `experiment` tells records apart that other settings left behind, say on another machine's disk.
    """

    def __init__(self, stem: str, experiment: str = ""):
        state = PartialState()
        self.stem, self.experiment = stem, experiment
        self.path = Path(f"{stem}.progress-{state.process_index}.jsonl")
        try:
            found = [record for path in self.share_of_files() for record in read_records(path)]
            found = [record for record in found if record.get("experiment") == experiment]
            # Nobody writes before everybody has read.
            self.found: list[dict] = gather_object(found)
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(self.descriptor, b"\n")  # ends a line that a kill cut short
        except OSError as error:
            fail(f"cannot keep the progress in {str(self.path)!r}: {error}")

    def share_of_files(self) -> list[Path]:
        """This process's files of the last run, also where that had more processes."""
        state = PartialState()
        files = {path.stem.rpartition("-")[2]: path for path in Path().glob(f"{self.stem}.progress-*.jsonl")}
        return [
            path
            for number, path in files.items()
            if number.isdecimal() and int(number) % state.num_processes == state.process_index
        ]

    def add(self, records: list[dict]) -> None:
        """Append the records and hand them to the system at once: killing the process loses none of them."""
        lines = (json.dumps(record | {"experiment": self.experiment}) + "\n" for record in records)
        unwritten = "".join(lines).encode()
        try:
            while unwritten:
                unwritten = unwritten[os.write(self.descriptor, unwritten) :]
        except OSError as error:
            fail(f"cannot write {str(self.path)!r}: {error}; a rerun goes on from what is finished")

    def drop(self) -> None:
        """Remove the files, once what they led to is written."""
        os.close(self.descriptor)
        PartialState().wait_for_everyone()
        for path in self.share_of_files():
            path.unlink(missing_ok=True)


def digest(what: object) -> str:
    """A short name for anything that JSON can hold."""
    return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def drop_progress(stem: str) -> None:
    """Remove what a run left that was killed after its results were written."""
    for path in Path().glob(f"{stem}.progress-*.jsonl"):
        path.unlink(missing_ok=True)


def read_records(path: Path) -> list[dict]:
    """The lines of a file; one that was cut short, or damaged, counts as not written."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
