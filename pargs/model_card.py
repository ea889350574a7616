"""The card of a trained model: what it is, from what, on what, with which settings, and how well it does."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer

from pargs.origin import date_now, library_versions, repository_commit
from pargs.processes import describe_device

TRAINING_LOG = "training_log.jsonl"

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

- **Base model:** `{{ base }}`
- **Data:** {{ data }}
{% if held_out %}
## Held-out figures
{% if held_out_note %}
{{ held_out_note }}
{% endif %}
| | {{ held_out_columns | join(" | ") }} |
|---|{{ "---|" * (held_out_columns | length) }}
{% for name, values in held_out.items() -%}
| {{ name }} | {{ values | join(" | ") }} |
{% endfor %}{% endif %}
## Settings

The script's own settings, and those of TRL that differ from its defaults.

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| `{{ name }}` | `{{ value }}` |
{% endfor %}
## Where it comes from

{% for name, value in origin.items() -%}
- **{{ name }}:** {{ value }}
{% endfor %}
Every logged number is in `{{ log }}`, one JSON object a line.
"""


@dataclass
class Training:
    """What only the script knows of a model that it trains."""

    summary: str  # a sentence or two: what the model is, and how it was trained
    library: str  # that loads it: transformers or peft
    settings: dict[str, Any]  # as they were stated
    data: str
    held_out_columns: list[str]
    held_out: dict[str, list[str]]  # a figure's name -> its value in each column
    held_out_note: str = ""


def write_card(trainer: Trainer, training: Training) -> str:
    """The text of the card."""
    output_dir, base = Path(str(trainer.args.output_dir)).absolute(), training.settings["model_name_or_path"]
    commit = getattr(getattr(trainer.model, "config", None), "_commit_hash", None)
    seconds = next(
        (log["train_runtime"] for log in trainer.state.log_history[::-1] if "train_runtime" in log), 0
    )
    origin = {
        "Date": date_now(),
        "Updates": trainer.state.global_step,
        "Seconds of training": f"{seconds:.0f} (of the last launch, where it was continued)",
        "Device": describe_device(),
        "Code": f"pargs, commit {repository_commit() or 'unknown: no git checkout'}",
        "Versions": ", ".join(f"{name} {number}" for name, number in library_versions().items()),
    }
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base if is_hub_name(base) and not Path(base).is_dir() else None,
            library_name=training.library,
            model_name=output_dir.name,
            tags=["pargs", "trl", "reward-guided-decoding"],
        ),
        template_str=TEMPLATE,
        title=output_dir.name,
        base=base + (f" at commit {commit}" if commit else ""),
        origin=origin,
        log=TRAINING_LOG,
        **{field.name: getattr(training, field.name) for field in fields(training)},
    )
    return str(card)


def is_hub_name(name: str) -> bool:
    """Whether a model's name can be one of the hub's, where a card's `base_model` has to be found."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
