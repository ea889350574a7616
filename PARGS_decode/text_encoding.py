"""From text to ids, the same way in every stage. Each stage keeps its own copy of this file.

Characters of the data that spell a special token are encoded as text; only special tokens that stand in the
prompt template itself are live.
"""

import re

from transformers import PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, nothing added."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], template: str) -> list[list[int]]:
    """Ids of each prompt, nothing added around it; special tokens of `template` are live."""
    pieces = [live_pieces(tokenizer, prompt, template) for prompt in prompts]
    ids = iter(encode_texts(tokenizer, [text for parts in pieces for text in parts[::2]]))

    encoded = []
    for parts in pieces:
        prompt_ids = next(ids)
        for special in parts[1::2]:
            prompt_ids = prompt_ids + [tokenizer.convert_tokens_to_ids(special)] + next(ids)
        encoded.append(prompt_ids)
    return encoded


def live_pieces(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str) -> list[str]:
    """Split a prompt into text, live special token, text, ...: an odd number of pieces, most often one."""
    head, _, tail = template.partition("{post}")
    if not (tokenizer.all_special_tokens and prompt.startswith(head) and prompt.endswith(tail)):
        return [prompt]

    special = re.compile("(" + "|".join(map(re.escape, tokenizer.all_special_tokens)) + ")")
    post = prompt[len(head) : len(prompt) - len(tail)]
    *before, last = special.split(head)
    first, *after = special.split(tail)
    return [*before, last + post + first, *after]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str]
) -> list[list[int]]:
    """Ids of each response as they follow its prompt's ids in a decoder-only model, nothing added."""
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


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special ids that the tokenizer puts before a text (a BOS, or nothing)."""
    encoded = tokenizer("a")
    return encoded["input_ids"][: encoded.sequence_ids(0).index(0)]


def decode_texts(tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> list[str]:
    """Text of each sequence of ids, special tokens left out, spaces as they are."""
    return tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=True)
