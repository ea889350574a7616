"""Ranking accuracy on prefixes: what the models read, how pairs are ranked, the figures and the errors."""

import json
from math import sqrt
from pathlib import Path

import pandas as pd
import prefix_accuracy
import pytest
import torch
from conftest import make_posts
from datasets import Dataset
from prefix_accuracy import PERCENTAGES, choose_pairs, compare, prefix_lengths, print_comparison, rank, score
from prefix_figures import draw_accuracy, name_models
from reward_reading import SIDES, Pair, ask, encode_pair, read_rewards
from small_runs import TEMPLATE, refuse, run_script, write_dataset
from tldr_data_process_partial import encode_pairs
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pargs.models import RewardModel, load_reward_model
from pargs.prefixes import EncodedResponse

FIGURES = {f"{name}.{kind}" for name in ("prefix_accuracy", "token_rewards") for kind in ("png", "pdf")}
TABLES = {"prefix_accuracy.csv", "prefix_accuracy_paired.csv"}


def comparisons(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": TEMPLATE.format(post=post), "chosen": f" {good}", "rejected": f" {bad}"}
        for post, good, bad in make_posts(count, seed)
    ]


@pytest.fixture
def load(small_models):
    """A small reward model by its name."""

    def load(name: str, token_budget: int = 4096) -> RewardModel:
        return load_reward_model(small_models[name], torch.float32, "cpu", token_budget)

    return load


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_an_encoder_reads_what_its_tokenizer_makes_of_the_pair(load, name):
    model = load(name)
    for row in comparisons(5):
        pair = encode_pair(model, row, TEMPLATE)
        (question,) = ask(model, pair.prompt_ids, pair.sides["chosen"], [1000])
        encoded = model.tokenizer(row["prompt"], row["chosen"])
        assert list(question.input_ids) == encoded["input_ids"]
        assert list(question.segments) == encoded.get("token_type_ids", [0] * len(question.input_ids))


@pytest.mark.parametrize("name", ["bert", "deberta", "gpt2-reward"])
def test_prefixes_are_those_of_the_training_data(load, name):
    model, rows = load(name), comparisons(6, seed=3)
    rows[0]["chosen"] = "  wife and landlord"  # two spaces: a prefix of one token is no slice of the ids
    # Unknown tokens, and behind them one character that becomes three tokens.
    rows[1]["chosen"] = " my \U0001f951 wife sold the \U0001f951…"
    batch = {column: [row[column] for row in rows] for column in rows[0]}
    encoded = encode_pairs(batch, model.tokenizer, model.frame, model.causal, TEMPLATE, 10**6)

    if name == "deberta":
        assert any(encoded["chosen_reencoded"])
    if not model.causal:
        unknown = encode_pair(model, rows[1], TEMPLATE).sides["chosen"]
        assert unknown.ids.count(model.tokenizer.unk_token_id) >= 2
        for text in (" my \U0001f951", " my \U0001f951 wife"):  # never spelt "[UNK]"
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert unknown.prefix(len(ids)) == ids
    compared = 0
    for at, row in enumerate(rows):
        pair = encode_pair(model, row, TEMPLATE)
        lengths = encoded["lengths"][at]
        assert lengths == list(range(1, pair.longest + 1))
        for side in SIDES:
            again = {prefix["length"]: prefix["ids"] for prefix in encoded[f"{side}_reencoded"][at]}
            questions = ask(model, pair.prompt_ids, pair.sides[side], lengths)
            for length, question in zip(lengths, questions, strict=True):
                prefix = again.get(length, encoded[f"{side}_ids"][at][:length])
                assert list(question.seen) == model.frame.ids(encoded["prompt_ids"][at], prefix)
                compared += 1
    assert compared > 100


def test_lengths_are_rounded_up_and_end_at_the_whole():
    assert prefix_lengths(10) == list(range(1, 11))
    assert prefix_lengths(3) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert prefix_lengths(25)[:2] == [3, 5] and prefix_lengths(25)[-1] == 25


@pytest.mark.parametrize("name", ["bert", "gpt2-reward"])
def test_past_its_end_a_response_stays_whole(load, name):
    model = load(name)
    pair = encode_pair(model, comparisons(1)[0], TEMPLATE)
    size = len(pair.sides["chosen"].ids)
    last, whole, past = ask(model, pair.prompt_ids, pair.sides["chosen"], [size - 1, size, size + 7])
    assert past == whole != last

    # Only a finished response of a causal model ends in EOS.
    ends = {question.seen[-1] == model.tokenizer.eos_token_id for question in (whole, past)}
    assert ends == {model.causal}
    assert not model.causal or last.seen[-1] != model.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["bert", "deberta", "gpt2-reward", "llama-reward"])
def test_rewards_are_those_of_each_prefix_read_alone(load, name):
    """Padding, batches, and one pass for all prefixes of a causal model change nothing."""
    model, questions = load(name), []
    for row in comparisons(4, seed=5):
        pair = encode_pair(model, row, TEMPLATE)
        for response in pair.sides.values():
            questions += ask(model, pair.prompt_ids, response, prefix_lengths(pair.longest))

    expected = []
    for question in questions:
        inputs = {"input_ids": torch.tensor([question.seen])}
        if model.has_segments:
            inputs["token_type_ids"] = torch.tensor([question.segments])
        with torch.inference_mode():
            if model.causal:  # at the last token: the classifier itself looks behind EOS, its padding
                hidden = model.model.base_model(**inputs).last_hidden_state
                expected.append(model.model.score(hidden[0, -1]).item())
            else:
                expected.append(model.model(**inputs).logits.item())

    assert max(expected) - min(expected) > 0.1
    for budget in (1, 700, 10**6):
        model.token_budget = budget
        assert read_rewards(model, questions, "") == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ["gpt2-reward", "llama-reward"])
@pytest.mark.parametrize("eos", ["always", "never"])
def test_an_eos_behind_every_prefix_or_behind_none(load, name, eos):
    """Against each prefix read alone: its ids, with an EOS of their own or without one."""
    model, pairs = load(name), []
    for row in comparisons(3, seed=5):
        pairs.append(encode_pair(model, row, TEMPLATE))
    ours, (curves,) = score(model, pairs, pairs[:1], eos=eos)

    def alone(pair: Pair, side: str, length: int) -> tuple[float, list[int]]:
        written = pair.sides[side].ids[:-1][:length]
        read = [*pair.prompt_ids, *written, *[model.tokenizer.eos_token_id] * (eos == "always")]
        with torch.inference_mode():
            hidden = model.model.base_model(torch.tensor([read])).last_hidden_state
            return model.model.score(hidden[0, -1]).item(), read

    for at, pair in enumerate(pairs):
        cells = ours[ours["pair"] == at]
        for cell, length in zip(cells.itertuples(), prefix_lengths(pair.longest), strict=True):
            (chosen, chosen_ids), (rejected, rejected_ids) = (alone(pair, side, length) for side in SIDES)
            assert (cell.chosen, cell.rejected) == pytest.approx((chosen, rejected), abs=2e-4)
            assert cell.same == (chosen_ids == rejected_ids)
    for side in SIDES:
        lengths = range(1, len(pairs[0].sides[side].ids) + 1)
        expected = [alone(pairs[0], side, length)[0] for length in lengths]
        assert curves[side] == pytest.approx(expected, abs=2e-4)

    # It is another question than that of a finished response alone.
    usual, _ = score(model, pairs, [])
    whole = ours["percent"] == 100
    assert (ours["chosen"][whole] - usual["chosen"][whole]).abs().max() < 2e-4 or eos == "never"
    changed = ~whole if eos == "always" else whole
    assert (ours["chosen"][changed] - usual["chosen"][changed]).abs().max() > 0.1


def test_a_response_and_its_prefix_are_the_same_where_both_are_closed(load):
    """Of two responses that begin alike the shorter is over: with an EOS behind both, nothing is to rank."""
    model, tokens = load("gpt2-reward"), list(range(50, 60))
    eos = model.tokenizer.eos_token_id
    sides = {
        "chosen": EncodedResponse([*tokens[:5], eos], {}),
        "rejected": EncodedResponse([*tokens, eos], {}),
    }
    pair = Pair("p", [20, 21], sides)
    lengths = prefix_lengths(pair.longest)
    assert lengths == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for reading, num_same in (("finished", 4), ("always", 4), ("never", 4)):
        rewards, _ = score(model, [pair], [], eos=reading)
        assert list(rewards["same"]) == [True] * num_same + [False] * (10 - num_same), reading
        assert (rewards["chosen"] == rewards["rejected"])[rewards["same"]].all()


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The interval by its formula (Wilson 1927)."""
    z, share = 1.959963984540054, correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def test_accuracy_and_interval_by_hand():
    cells = [
        # At 50%: above, below, equal rewards of different prefixes, and a pair whose prefixes are the same.
        (0, 50, False, 1.0, 0.5),
        (1, 50, False, 1.0, 1.5),
        (2, 50, False, 1.0, 1.0),
        (3, 50, True, 1.0, 1.0),
        *((pair, 100, False, 2.0, 1.0) for pair in range(3)),
        (3, 100, False, 1.0, 2.0),
        (0, 10, True, 1.0, 1.0),
    ]
    table = rank(pd.DataFrame(cells, columns=["pair", "percent", "same", "chosen", "rejected"]))
    table = table.set_index("percent")

    assert list(table.loc[50, ["n", "same_prefix", "correct"]]) == [3, 1, 1]
    assert list(table.loc[100, ["n", "same_prefix", "correct"]]) == [4, 0, 3]
    for percent, correct, n in ((50, 1, 3), (100, 3, 4)):
        assert table.loc[percent, "accuracy"] == pytest.approx(correct / n)
        low, high = wilson(correct, n)
        assert table.loc[percent, "interval_low"] == pytest.approx(low)
        assert table.loc[percent, "interval_high"] == pytest.approx(high)
    assert table.loc[10, "n"] == 0 and pd.isna(table.loc[10, "accuracy"])


def cells_of(*pairs: tuple[bool, str]) -> pd.DataFrame:
    """A model's rewards at 50%: of each pair, whether the prefixes are the same, and which scores higher."""
    rewards = {"chosen": (2.0, 1.0), "rejected": (1.0, 2.0), "neither": (1.0, 1.0)}
    rows = [(at, 50, same, *rewards[above]) for at, (same, above) in enumerate(pairs)]
    return pd.DataFrame(rows, columns=["pair", "percent", "same", "chosen", "rejected"])


def test_two_models_on_the_same_pairs_by_hand(capsys):
    right, wrong, equal, same = (False, "chosen"), (False, "rejected"), (False, "neither"), (True, "neither")

    def compared(full: list, partial: list) -> pd.DataFrame:
        return compare({"full": cells_of(*full), "partial": cells_of(*partial)}, resamples=9999, seed=0)

    # Of eight pairs two are the same to one of the models; of six, one model alone is right.
    table = compared([wrong] * 5 + [right, same, right], [right] * 6 + [right, same])
    assert list(table.loc[0, ["percent", "n", "full_only", "partial_only"]]) == [50, 6, 0, 5]
    table = compared([wrong] * 5 + [right, same, right], [right] * 5 + [wrong, right, same])
    assert list(table.loc[0, ["percent", "n", "full_only", "partial_only"]]) == [50, 6, 1, 5]
    assert table.loc[0, "difference"] == pytest.approx(4 / 6)
    assert table.loc[0, "p"] == pytest.approx(2 * (1 + 6) / 2**6)  # six coins: at most one falls otherwise
    # The -1 is in no draw of 33% of the resamples, in three or more of 6.2%, in four or more of 0.9%.
    assert list(table.loc[0, ["interval_low", "interval_high"]]) == [0, 1]
    print_comparison(table)
    shown = capsys.readouterr().out.splitlines()[-1].split()
    assert shown == ["50%", "6", "1", "5", "+0.667", "[+0.000,", "+1.000]", "0.219"]
    ranked = {label: rank(cells_of(right, wrong)) for label in ("full", "partial")}
    accuracy = pd.concat(ranked, names=["model"]).reset_index("model")
    names = name_models({"full": "always", "partial": "finished"})
    above, below = draw_accuracy(accuracy, table, 6, names).axes
    legend = [text.get_text() for text in above.get_legend().get_texts()]
    assert legend == ["full reward model, EOS behind every prefix", "partial reward model"]
    assert above.get_xlim() == below.get_xlim()
    assert list(below.lines[1].get_xydata()[0]) == [50, pytest.approx(4 / 6)]
    assert below.collections[0].get_segments()[0][:, 1].tolist() == [0, 1]

    table = compared([right, wrong, wrong], [right, wrong, equal])
    assert list(table.loc[0, ["n", "full_only", "partial_only", "difference", "p"]]) == [3, 0, 0, 0, 1]
    table = compared([same], [same])
    assert table.loc[0, "n"] == 0 and table.loc[0, ["difference", "interval_low", "p"]].isna().all()


def test_prompts_are_the_sample(load):
    """Of several pairs of a prompt one is ranked."""
    model, rows = load("bert"), comparisons(5)
    rows[3]["prompt"] = rows[1]["prompt"]
    settings = prefix_accuracy.Settings(num_pairs=4)
    pairs, left_out = choose_pairs(Dataset.from_list(rows), {"full": model}, TEMPLATE, settings)
    assert [pair["full"].prompt for pair in pairs] == [rows[at]["prompt"] for at in (0, 1, 2, 4)]
    assert dict(left_out) == {"further ones of a prompt": 1}


@pytest.mark.parametrize("name", ["bert", "gpt2-reward"])
def test_prefixes_that_are_the_same_are_not_ranked(load, name):
    model = load(name)
    if model.causal:
        tokens = list(range(50, 60))
        sides = [[*tokens[:4], *tokens[5:9]], [*tokens[:4], *tokens[1:7]]]
        pair = Pair(
            "p", [20, 21], {side: EncodedResponse(ids, {}) for side, ids in zip(SIDES, sides, strict=True)}
        )
    else:  # the text decides: it must come back as the same tokens
        texts = {"chosen": " my wife ate my bike", "rejected": " my wife ate my café lunch too"}
        pair = encode_pair(model, {"prompt": "POST: a", **texts}, TEMPLATE)

    rewards, (curves,) = score(model, [pair], [pair])
    both = zip(*(response.ids for response in pair.sides.values()), strict=False)
    common = next(at for at, (chosen, rejected) in enumerate(both) if chosen != rejected)
    expected = [length <= common for length in prefix_lengths(pair.longest)]
    assert True in expected and False in expected
    assert list(rewards["same"]) == expected and list(rewards["percent"]) == list(PERCENTAGES)
    assert [len(curves[side]) for side in SIDES] == [len(pair.sides[side].ids) for side in SIDES]
    assert curves["chosen"][-1] == rewards["chosen"].iloc[-1]


@pytest.mark.slow
@pytest.mark.parametrize("models, count", [(("deberta", "bert"), 12), (("bert", "llama-reward"), 1)])
def test_writes_both_figures_and_the_table(small_models, tmp_path, capsys, models, count):
    rows = comparisons(count)
    hostile = " $5_{ and $6 \\frac{ <b>"  # mathtext to a plotting library, were it not told
    rows[0] |= {"prompt": TEMPLATE.format(post=hostile), "chosen": hostile}
    write_dataset(tmp_path, validation=rows)
    full, partial = (small_models[name] for name in models)
    arguments = ["--full_reward_model", full, "--partial_reward_model", partial, "--num_examples", 1]
    run_script(prefix_accuracy, tmp_path, *arguments, "--output_dir", "out")

    table = pd.read_csv(tmp_path / "out/prefix_accuracy.csv")
    assert list(table["model"]) == ["full"] * 10 + ["partial"] * 10
    assert ((table["n"] + table["same_prefix"]) == count).all()
    paired = pd.read_csv(tmp_path / "out/prefix_accuracy_paired.csv")
    assert list(paired["percent"]) == list(PERCENTAGES)
    assert (paired["n"] <= table.groupby("percent")["n"].min().to_numpy()).all()
    full, partial = (table[table["model"] == label].iloc[-1] for label in ("full", "partial"))
    last = paired.iloc[-1]
    if last["n"] == count:
        assert last["partial_only"] - last["full_only"] == partial["correct"] - full["correct"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FIGURES | TABLES | {"prefix_accuracy.json"}
    for name in FIGURES:
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"%PDF") and len(content) > 5000

    printed = capsys.readouterr().out
    last = table[table["percent"] == 100].iloc[0]
    assert f"{last['accuracy']:.3f} [{last['interval_low']:.3f}, {last['interval_high']:.3f}]" in printed
    assert f"{count} of 128 ranked" in printed and "next: python" in printed and "nan" not in printed


@pytest.mark.slow
def test_a_pair_too_long_for_a_model_is_left_out(small_models, tmp_path, capsys):
    rows = comparisons(6)
    rows[2]["prompt"] = TEMPLATE.format(post="my boss shouts all night " * 80)
    write_dataset(tmp_path, validation=rows)
    models = ["--full_reward_model", small_models["bert"], "--partial_reward_model", small_models["bert"]]
    run_script(prefix_accuracy, tmp_path, *models, "--num_examples", 1)
    assert "1 pairs left out" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "prefix_accuracy.csv")
    assert ((table["n"] + table["same_prefix"]) == 5).all()
    said = refuse(prefix_accuracy, tmp_path, capsys, *models, "--max_length", 12)
    assert "fits into --max_length 12" in said

    # A quick look does not replace the figures of more pairs.
    quick = [*models, "--num_examples", 1, "--num_pairs", 3]
    said = refuse(prefix_accuracy, tmp_path, capsys, *quick)
    assert "prefix_accuracy.json is of 5 pairs, more than --num_pairs 3" in said and "--overwrite" in said
    run_script(prefix_accuracy, tmp_path, *quick, "--overwrite")
    record = json.loads((tmp_path / "prefix_accuracy.json").read_text())
    assert record["num_pairs"] == 3 and set(record["models"]) == {small_models["bert"]}


def classifier(folder: str, to: Path, num_labels: int) -> str:
    """The small BERT with another number of labels."""
    config = AutoConfig.from_pretrained(folder, num_labels=num_labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return str(to)


def test_clear_errors(small_models, tmp_path, capsys):
    full = ["--full_reward_model", small_models["bert"]]

    def error(*arguments: object) -> str:
        return refuse(prefix_accuracy, tmp_path, capsys, *arguments)

    assert "python DataProcess/tldr_data_process.py" in error(*full)
    write_dataset(tmp_path, validation=comparisons(3))
    for flag, value in (("--num_pairs", 0), ("--seed", -1), ("--no_such_flag", 1)):
        assert flag in error(*full, flag, value)

    missing = error(*full)
    assert "partial_reward_modeling_tldr" in missing
    assert "python partial_reward_training/tldr_partial_reward_model.py" in missing
    assert "--full_reward_model" in error("--full_reward_model", "no/such")

    two = classifier(small_models["bert"], tmp_path / "two", 2)
    assert "has 2 labels" in error(*full, "--partial_reward_model", two)
    assert "is no trained reward model" in error(*full, "--partial_reward_model", small_models["gpt2"])
