"""The prompts of a run: those of the test split, or the user's own."""

from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pargs.chat import chat_prompt, with_turns
from pargs.cli import fail, warn
from pargs.encoding import check_chat_ids
from pargs.files import MAKE_PAIRS, read_dataset, read_template
from pargs.models import load_tokenizer

NUM_TEST_PROMPTS = 100  # of the test split, where nobody says how many


class OwnMessage(BaseModel, strict=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content")
    @classmethod
    def strip(cls, content: str) -> str:
        return content.strip()  # as in stage 1


class OwnPrompt(BaseModel):
    """One line of a file of prompts, a text or a conversation; what else it holds is left alone."""

    model_config = ConfigDict(strict=True)

    prompt: str | list[OwnMessage]
    reference: str | None = None

    @field_validator("prompt")
    @classmethod
    def asks(cls, prompt: str | list[OwnMessage]) -> str | list[OwnMessage]:
        if isinstance(prompt, list) and not (prompt and prompt[-1].role == "user"):
            raise ValueError("the last message is not the user's")
        if not (prompt if isinstance(prompt, str) else prompt[-1].content).strip():
            raise ValueError("the prompt is blank")
        return prompt


def load_prompts(
    dataset: str, own_prompts: str | None, num_prompts: int | None, seed: int, policy: str = ""
) -> tuple[list[str], list[str | None], str]:
    """Prompts, their references (None where there is none) and the template they were built from.

    `num_prompts` of them: the first of a file, or drawn from the test split with `seed`. 0 is all; None is
    all of a file and NUM_TEST_PROMPTS of the test split. Fewer of the same seed are the first of more. The
    user's own conversations are written in the chat template of `policy`.
    """
    if own_prompts:
        prompts, references = read_own_prompts(own_prompts, policy)
        count = num_prompts or len(prompts)
        return prompts[:count], references[:count], read_template(dataset)
    splits, notes = read_dataset(dataset, {"test": ["prompt", "reference"]}, MAKE_PAIRS)
    test = splits["test"]
    if num_prompts and num_prompts > len(test):
        warn(f"the test split has {len(test)} prompts, not the {num_prompts} of --num_prompts")
    num_prompts = NUM_TEST_PROMPTS if num_prompts is None else num_prompts
    if num_prompts:
        # In memory: `datasets` would leave a cache file in the artifact it reads.
        test = test.shuffle(seed=seed, keep_in_memory=True).select(range(min(num_prompts, len(test))))
    turns = list(test["turns"]) if "turns" in test.features else None
    return with_turns(list(test["prompt"]), turns), list(test["reference"]), notes["template"]


def read_own_prompts(path: str, policy: str = "") -> tuple[list[str], list[str | None]]:
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
            fail(f'{path}, line {number} is not a JSON object with a "prompt", a text or messages: {reason}')
    if not rows:
        fail(f"{path} holds no prompts")
    prompts = [row.prompt if isinstance(row.prompt, str) else ask(row.prompt, path, policy) for row in rows]
    return prompts, [row.reference for row in rows]


def ask(messages: list[OwnMessage], path: str, policy: str) -> str:
    """A conversation in the policy's chat template."""
    tokenizer = load_tokenizer(policy)
    if not tokenizer.chat_template:
        fail(f"{path} holds conversations, and {policy!r} has no chat template: write prompts as text")
    check_chat_ids(policy, tokenizer)
    try:
        prompt = chat_prompt(tokenizer, [message.model_dump() for message in messages])
    except TemplateError as error:
        fail(f"{path} holds a conversation that the chat template of {policy!r} refuses: {error}")
    if prompt is None:
        fail(f"{path} holds a conversation that the chat template of {policy!r} alters: write it as text")
    return prompt
