"""Fast attention for DeBERTa reward models on a GPU, where it is asked for: --fast_attention.

transformers computes DeBERTa's attention step by step, with every score and position bias held as a matrix of
length x length. disentangled-flash (requirements-gpu.txt) computes the same in one kernel. It is used only
after it has given the same rewards as the attention of transformers; whatever goes wrong, that one stays.
It was not measured on a GPU yet, so it is off unless asked for.
"""

import sys
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from pargs.cli import warn

# How far rewards of a check batch may differ, in their standard deviations. In random models of 12 and 24
# layers rounding alone moved them by up to 0.02 (float16) and 0.23 (bfloat16); positions or padding read
# wrongly by 0.2 and more, and by 1.0 and more where the weights were large.
TOLERANCES = {torch.float16: 0.1, torch.bfloat16: 0.5}


def use_fast_attention(model: PreTrainedModel) -> str | None:
    """Give a DeBERTa-v2 or v3 classifier in half precision on a GPU fast attention, in place.

    Returns what is used now, or None where the model keeps the attention it had: with a warning on stderr
    where the package fails or is not installed, silently where the model, device or precision is another.
    """
    if model.config.model_type != "deberta-v2" or model.device.type != "cuda":
        return None
    if model.dtype not in TOLERANCES:
        return None
    if find_spec("disentangled_flash") is None:
        warn("no fast attention: `pip install -r requirements-gpu.txt` installs it")
        return None
    return switch_attention(model)


def switch_attention(model: PreTrainedModel) -> str | None:
    """Switch and check a model in evaluation mode, on whatever device; restores it if anything fails."""
    deberta: Any = model.get_submodule("deberta")
    encoder = deberta.encoder
    attentions = [layer.attention.self for layer in encoder.layer]
    expected = check_rewards(model)
    try:
        name = optimize(model)
        rewards = check_rewards(model)

        difference = (rewards - expected).abs().max().item()
        rounding = 4 * torch.finfo(model.dtype).eps * expected.abs().max()
        allowed = (TOLERANCES[model.dtype] * expected.std() + rounding).item()
        if not difference <= allowed:  # a NaN is no agreement either
            raise ValueError(f"its rewards differ by {difference:.2g}, where {allowed:.2g} is allowed")
    except Exception as error:  # whatever a package, Triton or a compiler raises: decoding goes on without
        deberta.encoder = encoder
        for layer, attention in zip(encoder.layer, attentions, strict=True):
            layer.attention.self = attention
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"warning: no fast attention (see requirements-gpu.txt): {reason}", file=sys.stderr)
        return None
    return f"attention of {name}; rewards of a check batch differ by {difference:.1g} at most"


def optimize(model: PreTrainedModel) -> str:
    """Hand the encoder to the package, ready for inputs of any length; returns its name and version."""
    from disentangled_flash import __version__, optimize_deberta
    from disentangled_flash.tuning import TUNING_SEQUENCE_LENGTHS

    deberta: Any = model.get_submodule("deberta")
    encoder, longest = deberta.encoder, model.config.max_position_embeddings
    families = [length for length in TUNING_SEQUENCE_LENGTHS if length >= longest]
    if not families:
        raise ValueError(f"disentangled-flash reads no inputs of {longest} tokens")

    # Downwards: a length shares its family's position tables, but only where those were made before it.
    optimize_deberta(deberta, sequence_lengths=range(families[0], 0, -1))
    if deberta.encoder is encoder:
        raise ValueError("disentangled-flash needs Triton and attention heads of 32, 64 or 128")
    deberta.encoder.register_forward_pre_hook(choose_length)
    return f"disentangled-flash {__version__}"


def choose_length(encoder: Any, inputs: tuple) -> None:
    """The package reads one prepared length at a time: the width of this batch."""
    encoder.activate_shape(inputs[0].shape[1])


@torch.inference_mode()
def check_rewards(model: PreTrainedModel) -> torch.Tensor:
    """Rewards [32] of random tokens: of a long and of a short batch, half of each one's rows padded."""
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for width in (model.config.max_position_embeddings, model.config.max_position_embeddings // 4):
        input_ids = torch.randint(model.config.vocab_size, (16, width), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[8:, width * 2 // 3 :] = 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        rewards.append(model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits)
    return torch.cat(rewards).squeeze(-1).float()
