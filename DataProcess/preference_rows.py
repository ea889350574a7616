"""From a row of any preference dataset to a prompt and two answers, or to the reason why it is of no use."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sources import UnusableRow, is_text_or_none
from trl.data_utils import maybe_extract_prompt

from pargs.chat import ANSWER, NAMES, Message, plain_text
from pargs.prefixes import SIDES

DIALOGUE = "\n\nAssistant:"  # what the last turn of Anthropic's HH begins with
ROLES = {name: role for role, name in NAMES.items()}
MESSAGES = 'a list of messages {"role": ..., "content": ...}'


@dataclass
class Layout:
    """How the rows of a source look: what their columns are called, and what is in them."""

    prompt: str | None  # None: both answers begin with the prompt
    chosen: str
    rejected: str
    conversational: bool = False  # the answers are lists of messages
    separator: str = ""  # what ends the prompt that two texts begin with


@dataclass
class Preference:
    """One row: its prompt as text and as messages, and two answers; `dropped` says why it is of no use."""

    prompt: str = ""
    messages: list[Message] = field(default_factory=list)
    chosen: str = ""
    rejected: str = ""
    dropped: str = ""

    @property
    def question(self) -> str:
        """The first human turn, by which dialogues are told apart."""
        return next(turn["content"] for turn in self.messages if turn["role"] == "user" and turn["content"])


def read_preference(row: Mapping[str, Any], index: int, layout: Layout) -> Preference:
    """One row as a preference.

    Raises:
        UnusableRow: a column is missing, or its cell is not what the rows of `layout` hold.
    """
    if layout.conversational:
        preference = read_conversations(row, index, layout)
    elif layout.prompt:
        columns = (layout.prompt, layout.chosen, layout.rejected)
        prompt, chosen, rejected = (read_text(row, column, index) for column in columns)
        preference = Preference(prompt, [question(prompt)], chosen, rejected)
    else:
        preference = split_texts(row, index, layout)
    preference.chosen, preference.rejected = preference.chosen.strip(), preference.rejected.strip()
    preference.dropped = preference.dropped or find_fault(preference)
    return preference


def find_fault(preference: Preference) -> str:
    if not any(turn["role"] == "user" and turn["content"] for turn in preference.messages):
        return "no prompt"
    if preference.messages[-1]["role"] != "user":
        return "no human turn before the answer"
    if not preference.chosen or not preference.rejected:
        return "empty answer"
    return "equal answers" if preference.chosen == preference.rejected else ""


def read_conversations(row: Mapping[str, Any], index: int, layout: Layout) -> Preference:
    """Two conversations, with the prompt before them or shared by both."""
    both = {side: read_messages(row, getattr(layout, side), index) for side in SIDES}
    if not all(both.values()):
        return Preference(dropped="empty answer")
    cell = layout.prompt and read_cell(row, layout.prompt, index)
    asked = any(message["role"] == "user" for messages in both.values() for message in messages)
    if isinstance(cell, str) and not asked:
        both |= {"prompt": [question(cell)]}
    # Else a prompt that is text repeats what both conversations begin with.
    elif layout.prompt and not isinstance(cell, str):
        prompt = read_messages(row, layout.prompt, index)
        # Whole conversations repeat it, too; of answers alone it is what stands before them.
        repeated = all(messages[: len(prompt)] == prompt for messages in both.values())
        both |= {} if repeated else {"prompt": prompt}

    apart = maybe_extract_prompt(both)
    if any([message["role"] for message in apart[side]] != ["assistant"] for side in SIDES):
        return Preference(dropped="parts before the last turn")
    messages = apart["prompt"]
    chosen, rejected = (apart[side][0]["content"] for side in SIDES)
    return Preference(plain_text([*messages, ANSWER]), messages, chosen, rejected)


def split_texts(row: Mapping[str, Any], index: int, layout: Layout) -> Preference:
    """Two texts that begin with the same prompt, up to the last separator."""
    parts = []
    for column in (layout.chosen, layout.rejected):
        text = read_text(row, column, index)
        if not text.strip():
            return Preference(dropped="empty answer")
        prompt, found, answer = text.rpartition(layout.separator)
        if not found:
            raise UnusableRow(f"row {index}: {column!r} holds no {layout.separator!r}, which ends the prompt")
        parts.append((prompt, answer))
    (prompt, chosen), (other_prompt, rejected) = parts
    goes_on = layout.separator == DIALOGUE and any("\n\nHuman:" in answer for answer in (chosen, rejected))
    if prompt != other_prompt or goes_on:
        return Preference(dropped="parts before the last turn")
    messages = read_dialogue(prompt) if layout.separator == DIALOGUE else [question(prompt)]
    return Preference(prompt + layout.separator, messages, chosen, rejected)


def read_dialogue(text: str) -> list[Message]:
    """The turns of `Human: ...`, `Assistant: ...`; what stands before the first of them is the system's."""
    before, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    messages = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for name, content in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": ROLES[name], "content": content.strip()})
    return messages


def question(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


# The cells of a row


def read_cell(row: Mapping[str, Any], column: str, index: int) -> Any:
    if column not in row:
        raise UnusableRow(f"row {index} has no column {column!r}; it has {', '.join(map(repr, row))}")
    return row[column]


def read_text(row: Mapping[str, Any], column: str, index: int) -> str:
    """A text; nothing counts as an empty one."""
    cell = read_cell(row, column, index)
    if not is_text_or_none(cell):
        raise UnusableRow(f"row {index}: {column!r} is {cell!r:.60}; expected a text, as in other rows")
    return cell or ""


def read_messages(row: Mapping[str, Any], column: str, index: int) -> list[Message]:
    cell = read_cell(row, column, index)
    if cell is not None and not isinstance(cell, list):
        expected = f"{MESSAGES}, as in other rows"
        raise UnusableRow(f"row {index}: {column!r} is {cell!r:.60}; expected {expected}")
    messages = []
    for message in cell or ():
        found = message if isinstance(message, dict) else {}
        role, content = found.get("role"), found.get("content")
        if role not in ROLES.values() or not isinstance(content, str) or not is_text_or_none(content):
            expected = f"{MESSAGES}, each a text by {', '.join(NAMES)}"
            raise UnusableRow(f"row {index}: {column!r} holds {message!r:.60}; expected {expected}")
        messages.append({"role": role, "content": content.strip()})
    return messages
