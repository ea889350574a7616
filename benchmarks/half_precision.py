"""What half precision changes: how far rewards move, and how many greedy tokens fall differently.

Reads   a policy, a reward model and a dataset of prompts; by default the models and posts of demo/.
Writes  a table, to standard output.

Each response is compared with the float32 one up to the first token that differs: after it, the two have
read different texts.

    python benchmarks/half_precision.py
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("PARGS_decode", "demo")]

import PARGS_baselines as decoding  # noqa: E402
from make_posts import draw_test_post  # noqa: E402

TEMPLATE = "POST: {post}\nTL;DR:"


@dataclass
class Settings:
    policy: str = field(default=str(ROOT / "demo/models/summariser"), metadata={"help": "The policy."})
    reward_model: str = field(
        default=str(ROOT / "demo/models/full-reward-model"), metadata={"help": "The guide."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "A file of lines with a prompt each, as PARGS_baselines.py reads it."}
    )
    num_prompts: int = field(default=50, metadata={"help": "How many of them."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest response in tokens."})
    k: int = field(default=10, metadata={"help": "Candidates a step."})
    dtypes: list[str] = field(
        default_factory=lambda: ["bfloat16", "float16"], metadata={"help": "Precisions beside float32."}
    )


def read_prompts(settings: Settings) -> list[str]:
    if settings.prompts:
        return decoding.read_own_prompts(settings.prompts)[0][: settings.num_prompts]
    rng = random.Random("half precision")
    return [TEMPLATE.replace("{post}", draw_test_post(rng)[1]) for _ in range(settings.num_prompts)]


def compare(exact: decoding.Row, other: decoding.Row) -> tuple[int, bool, list[float]]:
    """Steps compared, whether one differed, and how far the rewards of the same candidates moved."""
    moved: list[float] = []
    for at, (ours, theirs) in enumerate(zip(exact.steps, other.steps, strict=False), start=1):
        rewards = dict(zip(theirs["tokens"], theirs["rewards"], strict=True))
        pairs = zip(ours["tokens"], ours["rewards"], strict=True)
        moved += [abs(rewards[token] - reward) for token, reward in pairs if token in rewards]
        if ours["tokens"][ours["chosen"]] != theirs["tokens"][theirs["chosen"]]:
            return at, True, moved
    return len(exact.steps), False, moved


def main() -> None:
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    (settings,) = parser.parse_args_into_dataclasses()
    prompts = read_prompts(settings)

    rows = {}
    for dtype in ("float32", *settings.dtypes):
        how = decoding.Settings(
            policy=settings.policy,
            full_reward_model=settings.reward_model,
            k=settings.k,
            max_new_tokens=settings.max_new_tokens,
            trace=True,
            dtype=dtype,
        )
        rows[dtype], _ = decoding.decode_method("ARGS", prompts, TEMPLATE, how)

    table = []
    for dtype in settings.dtypes:
        compared = [compare(*pair) for pair in zip(rows["float32"], rows[dtype], strict=True)]
        moved = pd.Series([move for *_, moves in compared for move in moves])
        steps, differing = sum(steps for steps, *_ in compared), sum(differs for _, differs, _ in compared)
        table.append(
            {
                "precision": dtype,
                "steps compared": steps,
                "tokens that differ": differing,
                "rate": f"{differing / steps:.2%}",
                "same responses": f"{len(prompts) - differing} of {len(prompts)}",
                "reward moved, mean": moved.mean(),
                "99th percentile": moved.quantile(0.99),
                "largest": moved.max(),
            }
        )
    print(pd.DataFrame(table).to_markdown(index=False, floatfmt=".2g"))


if __name__ == "__main__":
    main()
