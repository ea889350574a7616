"""What half precision changes: how far rewards move, and how many greedy tokens fall differently.

Reads   a policy, a reward model and a dataset of prompts; by default the models and posts of demo/.
Writes  a table, to standard output.

Each response is compared with the float32 one up to the first token that differs: after it, the two have
read different texts.

    PYTHONPATH=PARGS_decode:demo python benchmarks/half_precision.py
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import PARGS_baselines as decoding
from make_posts import draw_test_post
from prompts import read_own_prompts
from pydantic import PositiveInt
from responses import Response
from run_models import Precision

from pargs.cli import parse_settings, setting

DEMO_MODELS = Path(__file__).parents[1] / "demo/models"
TEMPLATE = "POST: {post}\nTL;DR:"


@dataclass
class Settings:
    policy: str = setting(str(DEMO_MODELS / "summariser"), "The policy.")
    reward_model: str = setting(str(DEMO_MODELS / "full-reward-model"), "The guide.")
    prompts: str | None = setting(None, "A file of lines with a prompt each, as PARGS_baselines.py reads it.")
    num_prompts: PositiveInt = setting(50, "How many of them.")
    max_new_tokens: PositiveInt = setting(32, "Longest response in tokens.")
    k: PositiveInt = setting(10, "Candidates a step.")
    dtypes: list[Precision] = setting(["bfloat16", "float16"], "Precisions beside float32.")


def read_prompts(settings: Settings) -> list[str]:
    if settings.prompts:
        return read_own_prompts(settings.prompts)[0][: settings.num_prompts]
    rng = random.Random("half precision")
    return [TEMPLATE.replace("{post}", draw_test_post(rng)[1]) for _ in range(settings.num_prompts)]


def compare(exact: Response, other: Response) -> tuple[int, bool, list[float]]:
    """Steps compared, whether one differed, and how far the rewards of the same candidates moved."""
    moved: list[float] = []
    for at, (ours, theirs) in enumerate(zip(exact.steps, other.steps, strict=False), start=1):
        rewards = dict(zip(theirs["tokens"], theirs["rewards"], strict=True))
        pairs = zip(ours["tokens"], ours["rewards"], strict=True)
        moved += [abs(rewards[token] - reward) for token, reward in pairs if token in rewards]
        if ours["tokens"][ours["chosen"]] != theirs["tokens"][theirs["chosen"]]:
            return at, True, moved
    return len(exact.steps), False, moved


def decode(prompts: list[str], dtype: Precision, settings: Settings) -> list[Response]:
    run = decoding.Settings(
        policy=settings.policy,
        full_reward_model=settings.reward_model,
        k=settings.k,
        max_new_tokens=settings.max_new_tokens,
        trace=True,
        dtype=dtype,
    )
    return decoding.decode_method("ARGS", prompts, TEMPLATE, run).responses


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    prompts = read_prompts(settings)
    exact = decode(prompts, "float32", settings)

    table = []
    for dtype in settings.dtypes:
        others = decode(prompts, dtype, settings)
        compared = [compare(*pair) for pair in zip(exact, others, strict=True)]
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
