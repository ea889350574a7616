"""From text to ids, the same way in every stage.

Characters of the data that spell a special token are encoded as text; only special tokens that stand in the
prompt template itself, or between the turns of a chat template, are live.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerFast

from pargs.chat import ChatPrompt, chat_pieces, chat_prompt
from pargs.cli import fail

TEMPLATE_FIELDS = ("subreddit", "title", "post")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        special_ids = {token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id}
        for at, ids in enumerate(encoded):
            if not special_ids.isdisjoint(ids):
                encoded[at] = encode_cut(tokenizer, texts[at], special_ids)
        return encoded
    finally:
        backend.encode_special_tokens = False


def encode_cut(tokenizer: PreTrainedTokenizerFast, text: str, special_ids: set[int]) -> list[int]:
    """Ids of a text in which a unigram model found a special token among its pieces (DeBERTa: `[SEP]`).

    Each such word is cut after its first character, and the parts are encoded apart.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)  # full-width characters may spell one, too
    words = "|".join(map(re.escape, tokenizer.all_special_tokens))
    parts = re.split(f"(?=(?:{words}))(.)", text, flags=re.DOTALL)

    # Each cut leaves the text before it, the character itself, and the rest.
    glued = parts[:1]
    for character, rest in zip(parts[1::2], parts[2::2], strict=True):
        glued[-1] += character
        glued.append(rest)
    encodings = backend.encode_batch_fast([part for part in glued if part], add_special_tokens=False)
    return [token for encoding in encodings for token in encoding.ids if token not in special_ids]


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], template: str
) -> list[list[int]]:
    """Ids of each prompt, nothing added around it; special tokens of its template are live.

    A chat prompt is encoded by its turns, all others by `template`.
    """
    pieces = [live_pieces(tokenizer, prompt, template) for prompt in prompts]
    ids = iter(encode_texts(tokenizer, [text for texts, _ in pieces for text in texts]))

    encoded = []
    for prompt, (_, special_ids) in zip(prompts, pieces, strict=True):
        prompt_ids = next(ids)
        for special_id in special_ids:
            prompt_ids = [*prompt_ids, special_id, *next(ids)]
        # A chat template that writes the BOS does not need the tokenizer's own.
        start = start_ids(tokenizer) if isinstance(prompt, ChatPrompt) else []
        doubled = bool(start) and prompt_ids[: len(start)] == start
        encoded.append(prompt_ids[len(start) :] if doubled else prompt_ids)
    return encoded


def check_chat_ids(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Exit where a chat prompt, encoded between its special tokens, has other ids than as a whole.

    Some tokenizers of SentencePiece's kind write a space before every piece that is encoded alone.
    """
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "a b"}])
    if prompt is None:
        return
    (own,), whole = encode_prompts(tokenizer, [prompt], ""), tokenizer(prompt, add_special_tokens=False)
    if whole["input_ids"] not in (own, start_ids(tokenizer) + own):
        fail(
            f"the tokenizer of {name!r} writes the words between the special tokens of its chat template "
            "in a way that is not known here; write prompts as text"
        )


def live_pieces(
    tokenizer: PreTrainedTokenizerFast, prompt: str, template: str
) -> tuple[list[str], list[int]]:
    """The texts of a prompt, most often one, and the ids of the live special tokens between them."""
    if isinstance(prompt, ChatPrompt):
        return chat_pieces(tokenizer, prompt.turns)
    own_words = template_words(template)
    special = "|".join(map(re.escape, tokenizer.all_special_tokens))
    if not special or not any(re.search(special, words) for words in own_words):
        return [prompt], []
    values = read_fields(prompt, template)
    if values is None:
        return [prompt], []

    pieces = [""]
    for words, value in zip(own_words, (*values, ""), strict=True):
        first, *others = re.split(f"({special})", words)
        pieces[-1] += first
        pieces += others
        pieces[-1] += value
    return pieces[::2], cast(list[int], tokenizer.convert_tokens_to_ids(pieces[1::2]))


def read_fields(prompt: str, template: str) -> tuple[str, ...] | None:
    """What stands in the fields of a filled template, each as short as can be; None where it does not fit."""
    filled = re.fullmatch("(.*?)".join(map(re.escape, template_words(template))), prompt, re.DOTALL)
    return filled and filled.groups()


def template_words(template: str) -> list[str]:
    """What a prompt template says itself: before, between and behind its fields."""
    return re.split("|".join(re.escape(f"{{{name}}}") for name in TEMPLATE_FIELDS), template)


def encode_responses(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: list[str]
) -> list[list[int]]:
    """Ids of each response as they follow its prompt's ids in a decoder-only model, nothing added."""
    # Of a chat prompt they follow what stands behind its last special token.
    prompts = [
        chat_pieces(tokenizer, prompt.turns)[0][-1] if isinstance(prompt, ChatPrompt) else prompt
        for prompt in prompts
    ]
    alone = encode_texts(tokenizer, prompts)
    together = encode_texts(
        tokenizer, [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    )
    # Where tokens merge across the boundary, decoding could not have written them: encode what it can.
    apart = encode_texts(tokenizer, responses)
    return [
        both[len(prompt) :] if both[: len(prompt)] == prompt else response
        for prompt, both, response in zip(alone, together, apart, strict=True)
    ]


def start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special ids that the tokenizer puts before a text (a BOS, or nothing)."""
    encoded = tokenizer("a")
    return encoded["input_ids"][: encoded.sequence_ids(0).index(0)]


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a response, of a tokenizer that is known to have one."""
    return cast(int, tokenizer.eos_token_id)


def decode_texts(tokenizer: PreTrainedTokenizerFast, sequences: list[list[int]]) -> list[str]:
    """Text of each sequence of ids as it stands behind a prompt, special tokens left out.

    Decoders of SentencePiece's kind drop the space that a text begins with, so theirs are decoded behind a
    word, which is then taken off.
    """
    word, before = word_before(tokenizer)
    texts = decode_as_they_are(tokenizer, [word + ids for ids in sequences])
    return [text[len(before) :] for text in texts]


@lru_cache(maxsize=8)
def word_before(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str]:
    """Ids and text of the word that others are decoded behind; empty where a leading space is kept anyway."""
    word, two_words = encode_texts(tokenizer, ["a", "a a"])
    before, after = decode_as_they_are(tokenizer, [word, two_words[len(word) :]])
    return ([], "") if after == " a" else (word, before)


def decode_as_they_are(tokenizer: PreTrainedTokenizerFast, sequences: list[list[int]]) -> list[str]:
    return tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=True)
