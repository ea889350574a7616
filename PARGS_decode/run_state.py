"""What a run directory holds: whose settings it was claimed for, and which methods are finished."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import broadcast_object_list
from peft import PeftConfig
from progress import progress_files
from transformers import PreTrainedConfig

from pargs.cli import fail, is_main
from pargs.files import TRAIN_DPO, TRAIN_PARTIAL, write_text
from pargs.models import load_config, loading
from pargs.runs import (
    METHODS_FILE,
    REFERENCE,
    REWARDS,
    Generation,
    Method,
    MethodRecord,
    generation_path,
    read_if_whole,
    trace_path,
    write_methods,
)

SETTINGS_FILE = Path("decoding_settings.json")
MADE_BY = {
    "partial_reward_modeling_tldr": TRAIN_PARTIAL,
    "GPT2_large_tldr_DPO": TRAIN_DPO,
}


# Models


def check_models(
    methods: dict[str, Method], evaluator: str, settings: dict[str, Any]
) -> dict[str, str | None]:
    """Every model that the methods need is there; by name, what tells it from a later one of that name."""
    policies = {method.policy for method in methods.values()}
    needed = [model for method in methods.values() for model in method.models]
    identities = {}
    for model in dict.fromkeys([*needed, evaluator]):
        flags = [f"--{flag}" for flag, value in settings.items() if value == model]
        identities[model] = identify_model(model, flags, settings["k"] if model in policies else 0)
    return identities


def identify_model(name: str, flags: list[str], k: int = 0) -> str | None:
    """What tells a model from a later one of the same name; exits where it is not there.

    Better said now than after hours of decoding. `flags` name it; a policy must know at least `k` tokens.
    """
    hint = f"name another with {' or '.join(flags) or 'its row of METHODS'}"
    if name in MADE_BY:
        hint = f"make it with `{MADE_BY[name]}`, or {hint}"
    if (name in MADE_BY or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
        fail(f"there is no folder {name!r}; {hint}")

    config: PeftConfig | PreTrainedConfig
    if Path(name, "adapter_config.json").exists():
        with loading(repr(name), hint):
            config = PeftConfig.from_pretrained(name)
    else:
        config = load_config(name, hint)
    vocabulary = getattr(config, "vocab_size", k)
    if k > vocabulary:
        fail(f"--k {k} is more than the {vocabulary} tokens that {name!r} knows")

    identity = folder_digest(name) or getattr(config, "_commit_hash", None)
    base = folder_digest(getattr(config, "base_model_name_or_path", None) or "")
    return identity + base if identity and base else identity  # an adapter is one of its base


def folder_digest(name: str) -> str | None:
    """A digest of a model's folder, of whose large files blocks are read; None for a hub name."""
    if not name or not Path(name).is_dir():
        return None
    seen = blake2b(digest_size=8)
    for path in sorted(Path(name).iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json"):
            continue
        size = path.stat().st_size
        seen.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // 64)):
                file.seek(start)
                seen.update(file.read(4096))
    return seen.hexdigest()


# One directory, one experiment


def claim_directory(
    settings: dict[str, Any], models: dict[str, str | None], methods: list[str], overwrite: bool
) -> None:
    """Refuse to mix two experiments in one directory: the settings of the first are kept beside its files.

    `settings` are those that decide what is written; `models` the identities of the models to be used, as a
    model that was retrained is another setting. `overwrite` first deletes the results of `methods`, and of
    all methods where the settings differ.
    """
    try:
        theirs = json.loads(SETTINGS_FILE.read_text(encoding="utf-8"))
        known = theirs.pop("models", {})
    except (OSError, ValueError, AttributeError):
        theirs, known = {}, {}  # none that can be read, so whatever lies here is not known to be ours
    changes = [
        f"{key} (was {theirs.get(key)!r}, is {settings[key]!r})"
        for key in settings
        if theirs.get(key) != settings[key]
    ]
    changes += [
        f"the model {name!r} (it was trained anew or replaced)"
        for name in models.keys() & known.keys()
        if models[name] != known[name]
    ]

    files = [*Path().glob("generation_*.json*"), *Path().glob("trace_*.jsonl"), Path(REWARDS)]
    if overwrite:
        dropped = files if changes else [file for file in files if file.name in files_of(methods)]
        for file in dropped:
            file.unlink(missing_ok=True)
        if changes:
            Path(METHODS_FILE).unlink(missing_ok=True)
        if changes and any(file.suffix == ".json" for file in dropped):
            print(f"removed the results of other settings: {', '.join(changes)}")
        known = {} if changes else known
    elif changes and any(file.exists() for file in files):
        fail(
            f"this directory holds results of {'other' if theirs else 'unknown'} settings: "
            f"{', '.join(changes)}; use another directory, or --overwrite, which deletes them all"
        )
    content = {**settings, "models": known | models}
    write_text(SETTINGS_FILE, json.dumps(content, indent=1, ensure_ascii=False))


def files_of(methods: list[str]) -> set[str]:
    """What methods leave behind, finished or not."""
    names = {REWARDS}
    for method in methods:
        names |= {generation_path(method).name, trace_path(method).name}
        names |= {path.name for path in progress_files(method)}
    return names


# Results


def read_results(method: str, prompts: list[str]) -> list[Generation] | None:
    """The results of `method` in this directory; None where there are none for these prompts."""
    rows = read_if_whole(list[Generation], generation_path(method))
    return rows if rows is not None and [row.prompt for row in rows] == prompts else None


def known_methods() -> dict[str, MethodRecord]:
    """What methods.json says of the methods here; a damaged one counts as not written, like results."""
    return read_if_whole(dict[str, MethodRecord], Path(METHODS_FILE)) or {}


def methods_left(methods: list[str], traced: set[str], prompts: list[str]) -> list[str]:
    """The methods that an earlier launch did not finish; those `traced` need their trace.

    As the main process sees it: machines need not share a disk.
    """
    left, known = [], known_methods()
    for method in methods if is_main() else ():
        lacks_trace = method in traced and not trace_path(method).exists()
        if lacks_trace or method not in known or read_results(method, prompts) is None:
            left.append(method)
            continue
        print(f"{method}: done before, see {generation_path(method)}")
        for path in progress_files(method):  # of a launch that was killed after it had written the results
            path.unlink(missing_ok=True)
    return broadcast_object_list([left])[0]


def save_method(
    method: str,
    generations: list[Generation],
    steps: list[list[dict]] | None,
    record: MethodRecord,
    order: list[str],
) -> None:
    """Write the results last: a method with results is a finished one. `order` is that of all methods."""
    if steps is not None:
        traces = [{"prompt": row.prompt, "steps": own} for row, own in zip(generations, steps, strict=True)]
        lines = "".join(json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces)
        write_text(trace_path(method), lines)
    records = known_methods() | {method: record}
    write_methods({name: records[name] for name in (*order, *records) if name in records})

    rows = ",\n".join(
        json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False) for row in generations
    )
    write_text(generation_path(method), f"[\n{rows}\n]\n")


def collect_rewards(methods: list[str], prompts: list[str], references: list[float | None]) -> pd.DataFrame:
    """One row a prompt; a column for each of `methods` whose results are here, and the references'."""
    table, known = pd.DataFrame({"prompt": prompts}), known_methods()
    for method in methods:
        results = read_results(method, prompts) if method in known else None
        if results is not None:
            table[method] = [row.reward for row in results]
    table[REFERENCE] = references
    return table
