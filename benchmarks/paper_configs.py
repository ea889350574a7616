"""The configurations of the paper's models, which the benchmarks fill with random weights."""

from typing import Any

from transformers import DebertaV2Config, GPT2Config


def paper_configs(layers: int = 0) -> tuple[GPT2Config, DebertaV2Config]:
    """GPT2-large and DeBERTa-v3-large, as the hub has them but for the depth, if `layers` is given."""
    policy = GPT2Config(n_embd=1280, n_layer=layers or 36, n_head=20, n_positions=1024, vocab_size=50257)
    of_v3: dict[str, Any] = {
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pooler_hidden_size": 1024,
        "num_labels": 1,
    }
    reward_model = DebertaV2Config(
        vocab_size=128100,
        hidden_size=1024,
        num_hidden_layers=layers or 24,
        num_attention_heads=16,
        intermediate_size=4096,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pooler_hidden_act="gelu",
        **of_v3,
    )
    return policy, reward_model
