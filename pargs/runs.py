"""The files of a run directory: what stage 4 writes for each method, and how stage 5 reads it back."""

from io import BytesIO
from pathlib import Path
from typing import Literal, Self, TypeVar, cast

import numpy as np
import pandas as pd
from pydantic import (
    BaseModel,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from pargs.chat import ChatPrompt, Turn
from pargs.cli import fail
from pargs.files import DECODE, write_text
from pargs.origin import Origin

REWARDS = "baseline_results.csv"
REFERENCE = "reference"  # the column of the human references there
REFERENCES = "references.json"
METHODS_FILE = "methods.json"
REPORTS = ("average_reward.*", "results.json", "generations.html")  # of stage 5, made from a run's results

# Which continuations a decoder-only guide reads with an EOS behind them.
GuideEos = Literal["finished", "always", "never"]

T = TypeVar("T")


class Method(BaseModel, frozen=True):
    """How a method writes a response: its models, and how it picks a token from the policy's top k."""

    policy: str
    guide: str | None = None  # the reward model whose reward, times `weight`, is added to log pi
    weight: FiniteFloat = 0.0
    guide_eos: GuideEos = "finished"  # as it is trained here; "always" asks as if every prefix were finished
    greedy: bool = False  # the best candidate, or one sampled from the softmax of the scores
    best_of: PositiveInt = 1  # samples, of which `chooser` keeps the best
    chooser: str | None = None

    @model_validator(mode="after")
    def check_parts(self) -> Self:
        """Samples need somebody to choose among them, and a weight needs a guide."""
        if (self.best_of > 1 and not self.chooser) or (self.weight and not self.guide):
            raise ValueError("best_of needs a chooser, and weight a guide")
        return self

    @property
    def models(self) -> list[str]:
        """The policy and the reward models that it needs."""
        return [name for name in (self.policy, self.guide, self.chooser) if name]


class Cost(BaseModel):
    """What the last launch spent: on the `responses` that it wrote, and on choosing among all samples.

    What an earlier launch had finished is not written again, and not in it.
    """

    responses: NonNegativeInt  # delivered or not: best-of-n writes n for a prompt
    seconds: float
    tokens: NonNegativeInt  # that the policy wrote
    reward_calls: NonNegativeInt  # rewards of continuations that were asked for
    reward_tokens: NonNegativeInt  # that the reward model read for them
    # Not in older records.
    steps: NonNegativeInt = 0  # choices of a token: the EOS that ends a response is one, too
    candidates: NonNegativeInt = 0  # that were scored or sampled from, in all steps
    peak_gb: float | None = None  # most memory, of the process that took most

    @classmethod
    def together(cls, costs: "list[Cost]") -> "Cost":
        """What several processes did at the same time."""
        return cls(
            responses=sum(cost.responses for cost in costs),
            seconds=max(cost.seconds for cost in costs),
            tokens=sum(cost.tokens for cost in costs),
            reward_calls=sum(cost.reward_calls for cost in costs),
            reward_tokens=sum(cost.reward_tokens for cost in costs),
            steps=sum(cost.steps for cost in costs),
            candidates=sum(cost.candidates for cost in costs),
            peak_gb=max((cost.peak_gb for cost in costs if cost.peak_gb is not None), default=None),
        )

    def describe(self) -> str:
        """All of it in one line; what an older record does not hold is left out."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        parts = [
            f"{self.responses} responses, {self.tokens} tokens in {self.seconds:.1f} s ({rate:.0f} a second)"
        ]
        if self.reward_calls:
            parts.append(f"{self.reward_calls} rewards asked for, {self.reward_tokens} tokens read for them")
        if self.steps:
            parts.append(f"{self.candidates / self.steps:.1f} candidates a step")
        if self.peak_gb is not None:
            parts.append(f"peak memory {self.peak_gb:.2f} GB")
        return "; ".join(parts)


class MethodRecord(BaseModel):
    """One method of a run: what it was, what it cost, and where it comes from."""

    method: Method
    k: PositiveInt
    candidate_gap: float | None = None  # nats below the most probable candidate; None leaves none out
    max_new_tokens: PositiveInt
    reference_policy: str  # pi_ref, from which KL is measured
    evaluator: str | None = None  # the reward model whose rewards the table holds; not in older records
    cost: Cost
    # Not in older records.
    seed: int | None = None  # of the sampling
    dtype: str | None = None
    fast_attention: bool = False
    template: str | None = None  # of the prompts
    models: dict[str, str | None] = {}  # a digest of the folder, or the hub's commit, of each model
    origin: Origin | None = None  # of the last launch that decoded any of it

    @property
    def recipe(self) -> dict[str, object]:
        """All that decides what the method writes for a prompt, by name."""
        asks = bool(self.method.guide or self.method.chooser)
        return {
            **self.method.model_dump(),
            **self.model_dump(include={"k", "candidate_gap", "max_new_tokens", "dtype", "template"}),
            "seed": None if self.method.greedy else self.seed,
            "fast_attention": asks and self.fast_attention,
            "models": {name: self.models.get(name) for name in self.method.models},
        }


def describe_changes(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """What differs between two recipes, e.g. "weight was 1.0, is 2.0"."""
    changes = [
        f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if before.get(key) != value and key != "models"
    ]
    theirs, ours = (cast(dict, recipe.get("models", {})) for recipe in (before, now))
    return changes + [
        f"the model {name!r} was trained anew or replaced"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]


class Generation(BaseModel):
    """One response in `generation_*.json`."""

    prompt: str
    result: str
    reward: FiniteFloat
    num_tokens: NonNegativeInt
    finish_reason: Literal["eos", "length"]
    ids: list[int] | None = None  # what the policy wrote, the EOS that ended it included
    turns: list[Turn] | None = None  # of a chat prompt, from which its ids are made

    @property
    def asked(self) -> str:
        """The prompt as it is encoded, with its turns if it has any."""
        return ChatPrompt(self.turns) if self.turns else self.prompt


class Reference(BaseModel):
    """One row of `references.json`: what a human wrote, if anybody did, and its reward."""

    prompt: str
    reference: str | None
    reward: FiniteFloat | None


class Step(BaseModel):
    """The candidates of one step of a guided method, the most probable first.

    One that could not be chosen has no log-probability, and one that the guide was not asked about no reward.
    """

    tokens: list[str]
    log_probs: list[float | None]
    rewards: list[float | None]
    chosen: NonNegativeInt

    @model_validator(mode="after")
    def check_candidates(self) -> Self:
        """Each candidate has a log-probability and a reward (or null), and one of them was chosen."""
        if not len(self.tokens) == len(self.log_probs) == len(self.rewards) > self.chosen:
            raise ValueError(
                "a step needs tokens, log_probs and rewards of one length, and one of them chosen"
            )
        return self


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


def parse_json(kind: type[T], content: bytes, where: str, again: str = f"make it again with `{DECODE}`") -> T:
    """JSON as `kind`, or exit with one line that says `where` it is not, and how to have it `again`."""
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        fail(f"{where} is not what was written there ({at}: {first['msg']}); {again}")


def read_if_whole(kind: type[T], path: Path) -> T | None:
    """JSON of a file as `kind`; None where it is missing, cut short or foreign."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        fail(f"{path} is missing; make it with `{DECODE}`")
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


def read_rewards(path: Path) -> pd.DataFrame:
    """The table of rewards: `prompt`, and a column of numbers per method in which NaN is a missing reward."""
    content = read_bytes(path)
    try:
        # As text first: a post may well read "NA".
        table = pd.read_csv(BytesIO(content), dtype=str, keep_default_na=False)
        methods = list(table.columns.drop("prompt"))
        table[methods] = table[methods].replace("", "nan").astype(float)
        if not (methods and len(table) and isinstance(table.index, pd.RangeIndex)):
            raise ValueError("it needs a column per method and a row per prompt")
        if np.isinf(table[methods].to_numpy()).any():
            raise ValueError("a reward is infinite")
        if not content.endswith(b"\n"):
            raise ValueError("its last line is cut off")
    except (ValueError, KeyError) as error:
        fail(f"{path} is not the table that decoding writes ({error}); make it again with `{DECODE}`")
    return table


def read_methods(directory: Path = Path()) -> dict[str, MethodRecord]:
    """The methods of a run in the order of its table; none where the directory holds no record."""
    path = directory / METHODS_FILE
    return parse_json(dict[str, MethodRecord], read_bytes(path), str(path)) if path.exists() else {}


def write_methods(records: dict[str, MethodRecord], directory: Path = Path()) -> None:
    content = TypeAdapter(dict[str, MethodRecord]).dump_json(records, indent=1)
    write_text(directory / METHODS_FILE, content.decode() + "\n")
