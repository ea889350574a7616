"""The files of a run directory: what stage 4 writes for each method, and how stage 5 reads it back."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from pargs.cli import fail
from pargs.files import DECODE, write_text

REWARDS = "baseline_results.csv"
REFERENCE = "reference"  # the column of the human references there
METHODS_FILE = "methods.json"

T = TypeVar("T")


class Method(BaseModel, frozen=True):
    """How a method writes a response: its models, and how it picks a token from the policy's top k."""

    policy: str
    guide: str | None = None  # the reward model whose reward, times `weight`, is added to log pi
    weight: FiniteFloat = 0.0
    greedy: bool = False  # the best candidate, or one sampled from the softmax of the scores
    best_of: PositiveInt = 1  # samples, of which `chooser` keeps the best
    chooser: str | None = None

    @property
    def models(self) -> list[str]:
        """The policy and the reward models that it needs."""
        return [name for name in (self.policy, self.guide, self.chooser) if name]


class Cost(BaseModel):
    """What it took to decode `responses` responses in one launch; those of an earlier one are not in it."""

    responses: NonNegativeInt  # delivered or not: best-of-n writes n for a prompt
    seconds: float
    tokens: NonNegativeInt  # that the policy wrote
    reward_calls: NonNegativeInt  # rewards of continuations that were asked for
    reward_tokens: NonNegativeInt  # that the reward model read for them


class MethodRecord(BaseModel):
    """One method of a run: what it was, and what it cost."""

    method: Method
    k: PositiveInt
    max_new_tokens: PositiveInt
    reference_policy: str  # pi_ref, from which KL is measured
    cost: Cost


class Generation(BaseModel):
    """One response in `generation_*.json`."""

    prompt: str
    result: str
    reward: FiniteFloat
    num_tokens: NonNegativeInt
    finish_reason: Literal["eos", "length"]


class Step(BaseModel):
    """The candidates of one step of a guided method, the most probable first."""

    tokens: list[str]
    log_probs: list[float | None]
    rewards: list[float | None]
    chosen: NonNegativeInt


class Trace(BaseModel):
    """One line of `trace_*.jsonl`: how one response was written."""

    prompt: str
    steps: list[Step]


def file_stem(method: str) -> str:
    """PARGS-G -> pargs_g, as in generation_pargs_g.json."""
    return method.lower().replace("-", "_")


def generation_path(method: str, directory: Path = Path()) -> Path:
    return directory / f"generation_{file_stem(method)}.json"


def trace_path(method: str, directory: Path = Path()) -> Path:
    return directory / f"trace_{file_stem(method)}.jsonl"


def parse_json(kind: type[T], content: bytes, where: str) -> T:
    """JSON as `kind`, or exit with one line that says `where` it is not."""
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        fail(f"{where} is not what decoding writes ({at}: {first['msg']}); make it again with `{DECODE}`")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error}; make it with `{DECODE}`")


def read_generations(path: Path) -> list[Generation]:
    """A row per prompt; exits where the file is missing, damaged or foreign."""
    return parse_json(list[Generation], read_bytes(path), str(path))


def read_traces(path: Path) -> list[Trace]:
    """One trace per prompt; none where the run was not traced. Exits where the file is damaged."""
    if not path.exists():
        return []
    lines = read_bytes(path).splitlines()
    return [parse_json(Trace, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_methods(directory: Path = Path()) -> dict[str, MethodRecord]:
    """The methods of a run in the order of its table; none where the directory holds no record."""
    path = directory / METHODS_FILE
    return parse_json(dict[str, MethodRecord], read_bytes(path), str(path)) if path.exists() else {}


def write_methods(records: dict[str, MethodRecord], directory: Path = Path()) -> None:
    content = TypeAdapter(dict[str, MethodRecord]).dump_json(records, indent=1)
    write_text(directory / METHODS_FILE, content.decode() + "\n")
