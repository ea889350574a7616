"""The prompts of a run: those of the test split, or the user's own."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pargs.cli import fail
from pargs.files import MAKE_PAIRS, read_dataset, read_template

NUM_TEST_PROMPTS = 100  # of the test split, where nobody says how many


class OwnPrompt(BaseModel):
    """One line of a file of prompts; what else it holds is left alone."""

    model_config = ConfigDict(strict=True)

    prompt: str
    reference: str | None = None

    @field_validator("prompt")
    @classmethod
    def is_not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is blank")
        return prompt


def load_prompts(
    dataset: str, own_prompts: str | None, num_prompts: int | None, seed: int
) -> tuple[list[str], list[str | None], str]:
    """Prompts, their references (None where there is none) and the template they were built from.

    `num_prompts` of them: the first of a file, or drawn from the test split with `seed`. 0 is all; None is
    all of a file and NUM_TEST_PROMPTS of the test split. Fewer of the same seed are the first of more.
    """
    if own_prompts:
        prompts, references = read_own_prompts(own_prompts)
        count = num_prompts or len(prompts)
        return prompts[:count], references[:count], read_template(dataset)
    num_prompts = NUM_TEST_PROMPTS if num_prompts is None else num_prompts

    splits, notes = read_dataset(dataset, {"test": ["prompt", "reference"]}, MAKE_PAIRS)
    test = splits["test"]
    if num_prompts:
        # In memory: `datasets` would leave a cache file in the artifact it reads.
        test = test.shuffle(seed=seed, keep_in_memory=True).select(range(min(num_prompts, len(test))))
    return list(test["prompt"]), list(test["reference"]), notes["template"]


def read_own_prompts(path: str) -> tuple[list[str], list[str | None]]:
    """Read lines {"prompt": ..., "reference": ...}; the reference may be left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompts {path!r}: {error}")

    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [OwnPrompt.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            fail(f'{path}, line {number} is not a JSON object with a text "prompt": {reason}')
    if not rows:
        fail(f"{path} holds no prompts")
    return [row.prompt for row in rows], [row.reference for row in rows]
