"""The reward models of the study that no stage trains: of whole responses, with TRL's trainer."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import train_models
from datasets import Dataset, load_from_disk
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config, set_seed

from pargs.prefixes import SIDES, PairFrame


def train_full(
    dataset: Path, start: Path, output: Path, seed: int, rates: dict[str, Any], eos: bool = True
) -> None:
    """Bradley-Terry on the whole responses of a prefix dataset: the pairs that a partial model trains on.

    A decoder-only model is read at the EOS, or, without `eos`, at the last token of a response that has none.
    """
    set_seed(seed)
    reward_model, padding = train_models.start_reward_model(start, eos)
    frame = PairFrame(**json.loads((dataset / "processing.json").read_text())["frame"])
    pairs: Any = load_from_disk(str(dataset / "pairs"))
    ids = {
        f"{side}_ids": [
            frame.ids(row["prompt_ids"], row[f"{side}_ids"][: None if eos else -1]) for row in pairs["train"]
        ]
        for side in SIDES
    }
    with tempfile.TemporaryDirectory() as work:
        arguments = (reward_model, padding, Dataset.from_dict(ids), None, Path(work), seed, rates)
        train_models.fit_whole_responses(*arguments)
    train_models.save(reward_model, AutoTokenizer.from_pretrained(start), output)


def pretrain_encoder(output: Path) -> None:
    """The demo's encoder before it has seen a preference, with a reward head that knows nothing."""
    settings = train_models.Settings()
    set_seed(settings.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.output_dir / "full-reward-model")
    config = DebertaV2Config.from_pretrained(settings.output_dir / "full-reward-model")
    rows = train_models.draw_rows("train", settings.encoder_pairs, settings.seed)
    with tempfile.TemporaryDirectory() as work:
        body = train_models.train_encoder(settings, config, tokenizer, rows, Path(work))
    reward_model: Any = AutoModelForSequenceClassification.from_config(config)
    reward_model.deberta = body
    temporary = output.with_suffix(".tmp")
    reward_model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.rename(temporary, output)
