"""What a reward model reads: a frame of special tokens around a prompt and a response, whole or a prefix.

Training's entries and the questions of decoding and evaluation all come from here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from transformers import PreTrainedTokenizerFast

from pargs.encoding import encode_responses, encode_texts, eos_id, start_ids

SIDES = ("chosen", "rejected")  # of a comparison


@dataclass
class PairFrame:
    """An input is `start + prompt + middle + response + end`; the segment ids run along with it."""

    start: list[int]
    middle: list[int]
    end: list[int]
    start_segments: list[int]
    middle_segments: list[int]
    end_segments: list[int]
    prompt_segment: int
    response_segment: int

    @property
    def num_special(self) -> int:
        return len(self.start) + len(self.middle) + len(self.end)

    def ids(self, prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        return self.start + prompt_ids + self.middle + response_ids + self.end

    def segments(self, prompt_ids: list[int], response_ids: list[int]) -> list[int]:
        return (
            self.start_segments
            + [self.prompt_segment] * len(prompt_ids)
            + self.middle_segments
            + [self.response_segment] * len(response_ids)
            + self.end_segments
        )

    def to_json(self) -> dict:
        return asdict(self)


def make_frame(tokenizer: PreTrainedTokenizerFast, causal: bool) -> PairFrame:
    """The frame of a reward model: a decoder-only one reads what the policy reads, an encoder a pair."""
    if causal:
        start = start_ids(tokenizer)
        return PairFrame(start, [], [], [0] * len(start), [], [], 0, 0)

    pair = tokenizer("a", "a")
    ids = pair["input_ids"]
    segments = pair.get("token_type_ids", [0] * len(ids))
    sources = pair.sequence_ids(0)  # None for a special token, 0 for the prompt, 1 for the response

    prompt = [at for at, source in enumerate(sources) if source == 0]
    response = [at for at, source in enumerate(sources) if source == 1]
    start, middle, end = (
        slice(0, prompt[0]),
        slice(prompt[-1] + 1, response[0]),
        slice(response[-1] + 1, None),
    )
    return PairFrame(
        ids[start],
        ids[middle],
        ids[end],
        segments[start],
        segments[middle],
        segments[end],
        segments[prompt[0]],
        segments[response[0]],
    )


@dataclass
class EncodedResponse:
    """A response as a reward model reads it, with EOS where that is causal, and all its prefixes.

    `reencoded` holds, by length in tokens, the few prefixes whose text, encoded afresh, is no slice of `ids`.
    """

    ids: list[int]
    reencoded: dict[int, list[int]]

    def prefix(self, length: int) -> list[int]:
        """Ids of the prefix of `length` tokens; past its end a response stays whole."""
        return self.reencoded.get(length, self.ids[:length])


def encode_with_prefixes(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: list[str], causal: bool
) -> list[EncodedResponse]:
    """Each response and its prefixes as decoding asks a reward model about them.

    A causal model reads the policy's ids, so a prefix is a slice, and EOS, the last token of a finished
    response, stands in the longest alone. An encoder reads a prefix's text, encoded afresh.
    """
    if causal:
        encoded = encode_responses(tokenizer, prompts, responses)
        return [EncodedResponse([*ids, eos_id(tokenizer)], {}) for ids in encoded]

    encoded = encode_texts(tokenizer, responses)
    texts = [prefix_texts(tokenizer, response, ids) for response, ids in zip(responses, encoded, strict=True)]
    afresh = iter(encode_texts(tokenizer, list(chain.from_iterable(texts))))
    return [
        EncodedResponse(
            ids,
            {
                length: prefix_ids
                for length, prefix_ids in enumerate((next(afresh) for _ in prefixes), start=1)
                if prefix_ids != ids[:length]
            },
        )
        for ids, prefixes in zip(encoded, texts, strict=True)
    ]


def prefix_texts(tokenizer: PreTrainedTokenizerFast, response: str, ids: list[int]) -> list[str]:
    """The text of every proper prefix of `ids`, the ids of `response`, as a policy would have written it."""
    prefixes = tokenizer.backend_tokenizer.decode_batch(
        [ids[:length] for length in range(1, len(ids))], skip_special_tokens=False
    )

    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        # A decoded unknown token would be spelt "[UNK]"; the policy writes the character itself.
        known = ids.index(tokenizer.unk_token_id)
        encoded = tokenizer(
            response, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        if encoded["input_ids"] == ids:
            ends = [end for _, end in encoded["offset_mapping"]]
            prefixes[known:] = [response[: ends[at]] for at in range(known, len(ids) - 1)]

    # Some decoders strip the space that the response begins with.
    space = " " if response.startswith(" ") else ""
    return [prefix if prefix.startswith(space) else space + prefix for prefix in prefixes]
