"""Prompts of dialogues, which keep their turns: of special tokens only the chat template's are live."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from typing_extensions import TypedDict

NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # of the roles, in plain text
ANSWER = {"role": "assistant", "content": ""}  # that is asked for
Message = dict[str, str]  # its role and its content


class Turn(TypedDict):
    """A message in a rendered prompt; the last one is the answer that is asked for, its content empty."""

    role: str
    content: str
    before: str  # what the chat template writes before the content
    special_ids: list[int]  # of the special tokens in it: a tokenizer that has others reads plain text


class ChatPrompt(str):
    """A prompt's text, by which it goes everywhere, with the turns that its ids are made from."""

    turns: list[Turn]

    def __new__(cls, turns: list[Turn]) -> "ChatPrompt":
        prompt = super().__new__(cls, "".join(turn["before"] + turn["content"] for turn in turns))
        prompt.turns = turns
        return prompt

    def __getnewargs__(self) -> Any:  # for a copy in another process
        return (self.turns,)


def with_turns(prompts: Sequence[str], turns: Sequence[list[Turn] | None] | None) -> list[str]:
    """Prompts as they are read from files, where `turns` (None: there are none) stand beside them."""
    if turns is None:
        return list(prompts)
    return [
        ChatPrompt(own) if isinstance(own, list) else prompt
        for prompt, own in zip(prompts, turns, strict=True)
    ]


def chat_prompt(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> ChatPrompt | None:
    """What asks for the answer to `messages`; None where the chat template changes what they say.

    Raises:
        jinja2.TemplateError: the template refuses them.
    """
    # Of messages that say nothing but their number, all other words are the template's.
    numbered = [message | {"content": f"\ue000{at}\ue001"} for at, message in enumerate(messages)]
    *parts, last = re.split("\ue000([0-9]+)\ue001", render(tokenizer, numbered))
    words, numbers = parts[::2], parts[1::2]
    if numbers != [str(at) for at in range(len(messages))]:
        return None

    turns = []
    for message, before in zip([*messages, ANSWER], [*words, last], strict=True):
        special_ids = split_words(tokenizer, before)[1]
        turns.append(
            Turn(role=message["role"], content=message["content"], before=before, special_ids=special_ids)
        )
    prompt = ChatPrompt(turns)
    return prompt if prompt == render(tokenizer, messages) else None


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def split_words(tokenizer: PreTrainedTokenizerFast, words: str) -> tuple[list[str], list[int]]:
    """The text between the special tokens of a template's words, and the ids of these."""
    special = {token: at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {token.content: at for token, at in special.items()}
    if not ids:
        return [words], []
    # Some take in the white space around them.
    patterns = (r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in special)
    pieces = re.split(f"({'|'.join(patterns)})", words)
    return pieces[::2], [ids[piece.strip()] for piece in pieces[1::2]]


def chat_pieces(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[str], list[int]]:
    """Texts, and the ids of the live special tokens between them; plain text where the family is another."""
    texts, special_ids = [""], []
    for turn in turns:
        words, found = split_words(tokenizer, turn["before"])
        if found != turn["special_ids"]:
            return [plain_text(turns)], []
        texts[-1] += words[0]
        texts += words[1:]
        texts[-1] += turn["content"]
        special_ids += found
    return texts, special_ids


def plain_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """`Human: ...`, `Assistant: ...`, without the words of a chat template; an empty last turn stays open."""
    return "\n\n".join(f"{NAMES[message['role']]}: {message['content']}".rstrip() for message in messages)
