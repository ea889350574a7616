"""What a reward model's tokenizer puts around a prompt and a response. Each stage keeps its own copy."""

from dataclasses import asdict, dataclass

from text_encoding import start_ids
from transformers import PreTrainedTokenizerBase


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


def pair_frame(tokenizer: PreTrainedTokenizerBase) -> PairFrame:
    """Read the frame of an encoder off the tokenizer's own encoding of a pair."""
    pair = tokenizer("a", "a")
    ids = pair["input_ids"]
    segments = pair.get("token_type_ids", [0] * len(ids))
    sources = pair.sequence_ids(0)  # None for a special token, 0 for the prompt, 1 for the response

    prompt = [at for at, source in enumerate(sources) if source == 0]
    response = [at for at, source in enumerate(sources) if source == 1]
    cuts = slice(0, prompt[0]), slice(prompt[-1] + 1, response[0]), slice(response[-1] + 1, None)
    return PairFrame(
        *(ids[cut] for cut in cuts),
        *(segments[cut] for cut in cuts),
        segments[prompt[0]],
        segments[response[0]],
    )


def causal_frame(tokenizer: PreTrainedTokenizerBase) -> PairFrame:
    """The frame of a decoder-only reward model: it reads what the policy reads."""
    start = start_ids(tokenizer)
    return PairFrame(start, [], [], [0] * len(start), [], [], 0, 0)
