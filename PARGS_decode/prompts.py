"""The prompts of a run: those of the test split, or the user's own."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pargs.cli import fail
from pargs.files import MAKE_PAIRS, read_dataset, read_template


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
    dataset: str, own_prompts: str | None, num_prompts: int, seed: int
) -> tuple[list[str], list[str | None], str]:
    """Prompts, their references (None where there is none) and the template they were built from."""
    if own_prompts:
        return *read_own_prompts(own_prompts), read_template(dataset)

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
