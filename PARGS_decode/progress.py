"""What a launch has finished, kept as it goes: one that was killed goes on from there.

One file for each method and process, `generation_args.progress-0.jsonl`: a line for each finished response
and one for its reward, flushed at once. Both belong to their prompt alone, so it does not matter which
process, or which of several launches, wrote them.
"""

import json
import os
from hashlib import blake2b
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from responses import Response

from pargs.cli import fail, is_main
from pargs.processes import gather
from pargs.runs import generation_path


class Progress:
    """Append-only lines on one method's work; each process writes a file of its own and knows all.

    `experiment`, all that kept responses must agree in, tells lines apart that other settings left behind,
    say on another machine's disk; `scoring` does it for rewards. What the main process calls them counts.
    """

    def __init__(
        self, method: str, experiment: object = None, scoring: object = None, directory: Path = Path()
    ):
        state = PartialState()
        self.method, self.directory = method, directory
        names = [digest(experiment), digest([experiment, scoring])]
        self.experiment, self.scoring = broadcast_object_list(names)
        stem = generation_path(method, directory).with_suffix("")
        self.path = Path(f"{stem}.progress-{state.process_index}.jsonl")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = [line for path in self.own_files() for line in read_lines(path)]
            found = [line for line in found if line.get("experiment") in (self.experiment, self.scoring)]
            found = gather(found)  # nobody writes before everybody has read
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(self.descriptor, b"\n")  # ends a line that a kill cut short
        except OSError as error:
            fail(f"cannot keep the progress in {str(self.path)!r}: {error}")
        self.rewards: dict[str, float] = {line["pair"]: line["reward"] for line in found if "reward" in line}
        self.responses = {(line["prompt"], line["sample"]): line for line in found if "ids" in line}

    def own_files(self) -> list[Path]:
        """This process's files of the last launch, also where that had more processes."""
        state = PartialState()
        numbered = {
            path.stem.rpartition("-")[2]: path for path in progress_files(self.method, self.directory)
        }
        return [
            path
            for number, path in numbered.items()
            if number.isdecimal() and int(number) % state.num_processes == state.process_index
        ]

    def fill_in(self, responses: list[Response], samples: int) -> list[Response]:
        """Complete the responses that were finished before; returns those of prompts that are not whole."""
        unwritten = []
        for at in range(0, len(responses), samples):
            group = responses[at : at + samples]
            lines = [self.responses.get((prompt_key(each.prompt), each.sample)) for each in group]
            if None in lines:
                unwritten += group
                continue
            for response, line in zip(group, filter(None, lines), strict=True):
                response.ids, response.steps = line["ids"], line["steps"]
                response.eos_id = line["eos_id"]

        num_kept = len(responses) - len(unwritten)
        kept, total = map(sum, zip(*gather([(num_kept, len(responses))]), strict=True))
        if kept and is_main():
            print(f"{self.method}: {kept} of {total} responses kept from an earlier run")
        return unwritten

    def add_responses(self, responses: list[Response]) -> None:
        lines = [
            {
                "prompt": prompt_key(response.prompt),
                "sample": response.sample,
                "ids": response.ids,
                "eos_id": response.eos_id,
                "steps": response.steps,
            }
            for response in responses
        ]
        self.append(lines, self.experiment)

    def add_reward(self, pair: str, reward: float) -> None:
        """Keep the reward of a finished response; `pair` is the digest of its prompt and text."""
        self.append([{"pair": pair, "reward": reward}], self.scoring)

    def append(self, lines: list[dict], experiment: str) -> None:
        """Hand the lines to the system at once: killing the process loses none of them."""
        text = "".join(json.dumps(line | {"experiment": experiment}) + "\n" for line in lines)
        unwritten = text.encode()
        try:
            while unwritten:
                unwritten = unwritten[os.write(self.descriptor, unwritten) :]
        except OSError as error:
            fail(f"cannot write {str(self.path)!r}: {error}; a rerun goes on from what is finished")

    def drop(self) -> None:
        """Remove the files, once what they led to is written."""
        os.close(self.descriptor)
        PartialState().wait_for_everyone()
        for path in self.own_files():
            path.unlink(missing_ok=True)


def progress_files(method: str, directory: Path = Path()) -> list[Path]:
    return list(directory.glob(f"{generation_path(method).stem}.progress-*.jsonl"))


def read_lines(path: Path) -> list[dict]:
    """The lines of a file; one that was cut short, or damaged, counts as not written."""
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def prompt_key(prompt: str) -> str:
    """A short name for a prompt: a text and a conversation that reads like it have other ids."""
    return digest([prompt, getattr(prompt, "turns", None)])


def digest(content: object) -> str:
    """A short name for anything that JSON can hold."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
