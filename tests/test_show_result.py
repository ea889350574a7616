"""The result table against hand computations, from small files written here."""

import json
import os
import subprocess
import sys
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict

EVALUATION = Path(__file__).parents[1] / "Evaluation"
sys.path.insert(0, str(EVALUATION))

import show_result  # noqa: E402
from policy_likelihood import encode_pair, response_log_probs  # noqa: E402
from response_measures import distinct_n, guided_kl, rouge_l  # noqa: E402
from run_files import read_run, write_whole  # noqa: E402
from statistics_table import bootstrap_interval  # noqa: E402

PROMPTS = [f"POST: post {number}\nTL;DR:" for number in range(4)]
OUTPUTS = {f"average_reward.{kind}" for kind in ("csv", "md", "tex", "png", "pdf")}


def write_rewards(directory: Path, prompts: list[str] = PROMPTS, **rewards: list) -> Path:
    """A run with the columns given; `PARGS_G` stands for PARGS-G."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {name.replace("_", "-"): values for name, values in rewards.items()}
    pd.DataFrame({"prompt": prompts} | columns).to_csv(directory / "baseline_results.csv", index=False)
    return directory


def write_responses(
    directory: Path, stem: str, texts: list[str], num_tokens: list[int] | None = None
) -> None:
    lengths = num_tokens or [len(text.split()) for text in texts]
    rows = [
        {"prompt": prompt, "result": text, "reward": 0.0, "num_tokens": length, "finish_reason": "length"}
        for prompt, text, length in zip(PROMPTS, texts, lengths, strict=True)
    ]
    (directory / f"generation_{stem}.json").write_text(json.dumps(rows))


def write_references(directory: Path, references: list[str]) -> None:
    test = Dataset.from_dict({"prompt": PROMPTS[: len(references)], "reference": references})
    DatasetDict(test=test).save_to_disk(str(directory / "summarize_from_feedback"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the script in `tmp_path`; returns its table and what it printed."""

    def run(*arguments: str) -> tuple[pd.DataFrame, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["show_result.py", *map(str, arguments)])
        show_result.main()
        return pd.read_csv(tmp_path / "average_reward.csv", index_col="method"), capsys.readouterr().out

    return run


def test_statistics_by_hand(tmp_path, command):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], PARGS=[2, 2, 5, 3], reference=[0, 0, 0, 8])
    table, printed = command()

    args = table.loc["ARGS"]
    assert (args["n"], args["mean"]) == (4, 2.5)
    assert args["standard_error"] == pytest.approx(sqrt(5 / 3) / 2)  # squares 2.25 + .25 + .25 + 2.25, over 3
    # Of the 256 resamples 5 have a mean of at most 1.25 (2.0%) and 15 of at most 1.5 (5.9%); symmetric above.
    assert (args["interval_low"], args["interval_high"]) == (1.5, 3.5)
    assert np.isnan(args["difference"]) and np.isnan(args["win_rate"])

    pargs = table.loc["PARGS"]
    assert pargs["difference"] == 0.5  # (1 + 0 + 2 - 1) / 4
    assert pargs["win_rate"] == 0.625  # two wins, a tie, a loss
    # The differences are those four rewards less 2, so their resamples are as well.
    assert (pargs["difference_low"], pargs["difference_high"]) == (-0.5, 1.5)
    assert table.loc["reference", "win_rate"] == 0.25
    assert list(table["baseline"].unique()) == ["ARGS"]
    assert "2.500 ± 0.645" in printed and "+0.500 [-0.500, +1.500]" in printed


def test_baseline_of_choice_and_by_default(tmp_path, command):
    assert show_result.choose_baseline(None, ["DPO", "ARGS"]) == "ARGS"
    assert show_result.choose_baseline(None, ["DPO", "PPO"]) == "DPO"

    write_rewards(tmp_path, DPO=[1, 1, 1, 1], PPO=[3, 3, 3, 2])
    table, printed = command("--baseline", "PPO")
    assert table.loc["DPO", "difference"] == -1.75 and "vs PPO" in printed


def test_the_seed_decides_the_bootstrap():
    values = np.random.default_rng(0).normal(size=40)
    first, again, other = (bootstrap_interval(values, 200, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert np.isnan(bootstrap_interval(values[:1], 200, 1)).all()


def test_missing_rewards_are_named_and_not_averaged(tmp_path, command):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], PARGS=[2, None, "nan", 7], DPO=[None] * 4)
    table, printed = command()
    assert (table.loc["PARGS", "n"], table.loc["PARGS", "mean"]) == (2, 4.5)
    assert table.loc["PARGS", "difference"] == 2  # (2 - 1 + 7 - 4) / 2: rows that both have
    assert table.loc["DPO", "n"] == 0 and np.isnan(table.loc["DPO", "mean"])
    assert "PARGS has no reward in 2 of 4 rows (row 2, 3)" in printed
    assert "DPO has no reward in 4 of 4 rows" in printed
    assert "not in baseline_results.csv: PARGS-G, BESTN, TOP-K, PPO" in printed
    assert "PARGS has no generation_pargs.json" in printed


def test_runs_are_pooled_by_prompt_with_their_spread(tmp_path, command):
    write_rewards(tmp_path / "seed1", ARGS=[1, 2, 3, 4], PARGS=[2, 4, 4, 6])
    write_rewards(tmp_path / "seed2", ARGS=[1, 2, 3, 4], PARGS=[4, 4, 6, 6])
    table, printed = command("seed1/", "seed2")

    # A method that repeats itself is no more certain for it.
    alone, _ = command("seed1")
    columns = ["n", "mean", "standard_error", "interval_low", "interval_high"]
    assert list(table.loc["ARGS", columns]) == list(alone.loc["ARGS", columns])
    assert (table.loc["ARGS", "runs"], table.loc["ARGS", "run_std"]) == (2, 0)

    # Prompts average to 3, 4, 5, 6; runs to 4 and 5.
    assert table.loc["PARGS", "mean"] == 4.5
    assert table.loc["PARGS", "standard_error"] == pytest.approx(sqrt(5 / 3) / 2)
    assert table.loc["PARGS", "run_std"] == pytest.approx(sqrt(0.5))
    assert table.loc["PARGS", "difference"] == 2
    assert "2 runs pooled" in printed and "SD of runs" in printed
    assert "SD of runs" not in (tmp_path / "average_reward.md").read_text()  # that of the single run


def test_runs_with_other_prompts_and_methods(tmp_path, command):
    write_rewards(tmp_path / "a", ARGS=[1, 2, 3, 4], PARGS=[2, 2, 2, 2])
    write_rewards(tmp_path / "b", ["new 1", "new 2"], ARGS=[5, 9])
    table, printed = command("a", "b")
    assert (table.loc["ARGS", "n"], table.loc["ARGS", "mean"]) == (6, 4)
    assert (table.loc["PARGS", "n"], table.loc["PARGS", "runs"]) == (4, 1)
    assert table.loc["PARGS", "difference"] == -0.5
    assert "b: not in baseline_results.csv: PARGS-G, PARGS, BESTN" in printed


def test_length_diversity_and_overlap(tmp_path, command):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], reference=[1, 1, 1, 1])
    write_responses(tmp_path, "args", ["The cat sat", "a b a", "a b", "!"], num_tokens=[3, 5, 2, 10])
    write_references(tmp_path, ["the cats ran away", "x", "a b"])
    table, printed = command()
    assert table.loc["ARGS", "mean_tokens"] == 5
    assert table.loc["ARGS", "distinct_1"] == pytest.approx(5 / 8)  # the cat sat a b, of 3 + 3 + 2 words
    assert table.loc["ARGS", "distinct_2"] == pytest.approx(4 / 5)  # (a, b) comes twice
    # 4/7 (2 words in common of 3 and of 4), 0 and 1; the fourth prompt has no reference.
    assert table.loc["ARGS", "rouge_l"] == pytest.approx((4 / 7 + 0 + 1) / 3)
    assert "no reference for 1 of 4 responses" in printed


def test_distinct_n_and_rouge_l_by_hand():
    assert distinct_n(["a b a", "A, b!"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "A, b!"], 2) == pytest.approx(2 / 3)
    assert np.isnan(distinct_n(["word"], 2))
    assert rouge_l(["one two three"], [["three", "one three"]]) == [
        pytest.approx(0.8)
    ]  # the better reference


def test_responses_are_matched_by_prompt_not_by_place(tmp_path, command):
    odd = ["NA", 'quote " and,\r\nbreak', "twice", "twice"]
    write_rewards(tmp_path, odd, ARGS=[1, 2, 3, 4])
    order = [3, 1, 0, 2]
    rows = [{"prompt": odd[at], "result": f"text {place}", "num_tokens": 1} for place, at in enumerate(order)]
    (tmp_path / "generation_args.json").write_text(json.dumps(rows))
    run = read_run(str(tmp_path))
    assert list(run.responses["ARGS"]["result"]) == ["text 2", "text 1", "text 0", "text 3"]

    (tmp_path / "generation_args.json").write_text(json.dumps(rows[:1] + rows[2:]))
    _, printed = command()
    assert (
        "generation_args.json has no response for 1 of 4 prompts of baseline_results.csv (row 2)" in printed
    )


def test_what_is_written(tmp_path, command):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], MY_OWN=[2, 3, 4, 5], PARGS=[1, None, 2, 2])
    text = (tmp_path / "baseline_results.csv").read_text().replace("MY-OWN", "my_own & co")
    (tmp_path / "baseline_results.csv").write_text(text)
    command()

    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS | {"baseline_results.csv"}
    assert (tmp_path / "average_reward.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "average_reward.pdf").read_bytes().startswith(b"%PDF")
    markdown = (tmp_path / "average_reward.md").read_text(encoding="utf-8")
    assert "| PARGS" in markdown and "PARGS has no reward in 1 of 4 rows (row 2)" in markdown
    latex = (tmp_path / "average_reward.tex").read_text(encoding="utf-8")
    assert r"my\_own \& co & 4 & 3.500 ± 0.645 & [2.500, 4.500]" in latex and r"95\% interval" in latex
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert body[0].startswith(r"\begin{tabular}") and body[-1] == r"\end{tabular}"

    first = {name: (tmp_path / name).read_bytes() for name in OUTPUTS}
    command()
    assert first == {name: (tmp_path / name).read_bytes() for name in OUTPUTS}


def test_a_failed_write_leaves_what_was_there(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("old")

    def write_half(path: Path) -> None:
        path.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(SystemExit) as stopped:
        write_whole(tmp_path / "table.csv", write_half)
    assert stopped.value.code == 2
    assert (tmp_path / "table.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert "disk full" in capsys.readouterr().err


def no_table(directory: Path) -> None:
    (directory / "baseline_results.csv").unlink()


def edit(name: str, old: str, new: str):
    def change(directory: Path) -> None:
        path = directory / name
        text = path.read_text() if path.exists() else ""
        path.write_text(text.replace(old, new) if old else new)

    return change


BAD_TRACE = '{"prompt": "p", "steps": [{"tokens": ["a"], "log_probs": [], "rewards": [1], "chosen": 0}]}\n'


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (
            no_table,
            [],
            "baseline_results.csv is missing; make it with `python PARGS_decode/PARGS_baselines.py`",
        ),
        (
            edit("baseline_results.csv", ",3", ",three"),
            [],
            "row 3, column ARGS: 'three' is not a finite number",
        ),
        (edit("baseline_results.csv", ",3", ",inf"), [], "row 3, column ARGS: 'inf' is not a finite number"),
        (edit("baseline_results.csv", "", ""), [], "cannot read baseline_results.csv"),
        (edit("baseline_results.csv", "", "post,ARGS\na,1\n"), [], "needs a column `prompt`"),
        (edit("generation_args.json", "", "[{"), [], "cannot read generation_args.json"),
        (edit("generation_args.json", "", "{}"), [], "generation_args.json is not a list of responses"),
        (
            edit("generation_args.json", "", '[{"prompt": "p"}]'),
            [],
            "generation_args.json, row 1: needs the texts",
        ),
        (edit("trace_args.jsonl", "", BAD_TRACE), [], "trace_args.jsonl, line 1 is no trace"),
        (edit("summarize_from_feedback", "", "no dataset"), [], "cannot read the test split"),
        (None, ["--baseline", "args"], "--baseline args: not in baseline_results.csv, which has ARGS"),
        (None, ["--resamples", "0"], "--resamples must be at least 1, not 0"),
        (None, [".", "./"], "a run directory is named twice"),
        (None, ["--policy", "no/such/policy"], "cannot load the tokenizer of 'no/such/policy'"),
    ],
)
def test_clear_errors(tmp_path, command, capsys, monkeypatch, spoil, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4])
    write_responses(tmp_path, "args", ["a", "b", "c", "d"])
    if spoil:
        spoil(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_kl_from_a_trace_by_hand(tmp_path, command):
    steps = [
        {"tokens": ["a", "b"], "log_probs": [-1.0, -2.0], "rewards": [0.0, 1.0], "chosen": 1},
        {"tokens": ["c", "d"], "log_probs": [-0.5, -3.0], "rewards": [0.5, 0.5], "chosen": 0},
    ]
    # w = 2: scores (-1, 0) and (0.5, -2).
    by_hand = -log(1 + exp(-1)) + 2 - log(1 + exp(-2.5)) + 0.5
    assert guided_kl(steps, 2.0) == pytest.approx(by_hand)
    assert guided_kl(steps, None) == 2.5  # greedy: - log p of what was chosen

    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], PARGS=[1, 2, 3, 4], DPO=[1, 2, 3, 4])
    for stem in ("args", "pargs", "dpo"):
        write_responses(tmp_path, stem, ["b c"] * 4)
    for stem in ("args", "pargs"):
        lines = [json.dumps({"prompt": prompt, "steps": steps}) for prompt in PROMPTS[:3]]
        (tmp_path / f"trace_{stem}.jsonl").write_text("\n".join(lines) + "\n")
    table, printed = command()
    assert table.loc["ARGS", "sampled_kl"] == 2.5
    assert table.loc["PARGS", "sampled_kl"] == pytest.approx(by_hand)
    assert "PARGS: KL from the trace: no value for 1 of 4 responses" in printed
    assert "no KL for DPO" in printed


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A GPT-2 of one layer with a byte-level tokenizer, and another one of the same shape, on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )

    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=257, n_positions=96, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3
        )
        paths.append(tmp_path_factory.mktemp(f"policy{seed}"))
        GPT2LMHeadModel(config).save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return GPT2LMHeadModel.from_pretrained(paths[0], dtype=torch.float32).eval(), tokenizer, paths


def log_probs_one_by_one(model, prompt_ids: list[int], response_ids: list[int], k: int) -> tuple[list, list]:
    """The same numbers with no batch, no padding and one forward pass a token."""
    full, within = [], []
    for at, token in enumerate(response_ids):
        logits = model(torch.tensor([prompt_ids + response_ids[:at]])).logits[0, -1]
        probabilities = logits.double().softmax(-1)
        top = probabilities.topk(k)
        full.append(float(probabilities[token].log()))
        is_in = token in top.indices.tolist()
        within.append(float((probabilities[token] / top.values.sum()).log()) if is_in else float("-inf"))
    return full, within


def test_log_probs_of_a_padded_batch(policy):
    model, tokenizer, _ = policy
    pairs = [
        encode_pair(tokenizer, "POST: short\nTL;DR:", " a response", True, "{post}"),
        encode_pair(tokenizer, "POST: rather longer than that\nTL;DR:", " b", False, "{post}"),
        encode_pair(tokenizer, "x" * 95, " too long", True, "{post}"),
        encode_pair(tokenizer, "POST: nothing\nTL;DR:", "", False, "{post}"),
    ]
    assert pairs[0][1][-1] == tokenizer.eos_token_id and pairs[1][1][-1] != tokenizer.eos_token_id
    results = response_log_probs(model, pairs, k=40, batch_size=3, label="")
    for at in (0, 1):
        with torch.inference_mode():
            full, within = log_probs_one_by_one(model, *pairs[at], k=40)
        np.testing.assert_allclose(results[at][0], full, rtol=1e-4)
        np.testing.assert_allclose(results[at][1], within, rtol=1e-4)
    assert np.isinf(results[0][1]).any() and np.isfinite(results[0][1]).any()  # both kinds were compared
    assert len(results[2][0]) == len(results[3][0]) == 0


def test_only_special_tokens_of_the_template_are_live(policy):
    _, tokenizer, _ = policy
    eos = tokenizer.eos_token_id
    prompt_ids, response_ids = encode_pair(tokenizer, "a<|endoftext|>b", " <|endoftext|>", True, "{post}")
    assert eos not in prompt_ids
    assert response_ids.count(eos) == 1 and response_ids[-1] == eos

    template = "{post}<|endoftext|>TL;DR:"
    prompt_ids, _ = encode_pair(tokenizer, "a<|endoftext|>b<|endoftext|>TL;DR:", " c", False, template)
    assert prompt_ids.count(eos) == 1 and prompt_ids.index(eos) == len("a<|endoftext|>b")


def test_likelihood_and_kl_under_a_policy(tmp_path, command, policy):
    model, tokenizer, (reference_path, other_path) = policy
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], TOP_K=[1, 2, 3, 4], DPO=[1, 2, 3, 4], BESTN=[1, 2, 3, 4])
    texts = [" ab", " abc", " b", " cab"]
    for stem in ("args", "top_k", "dpo", "bestn"):
        write_responses(tmp_path, stem, texts)
    arguments = ["--policy", reference_path, "--dpo_policy", other_path, "--k", 257]
    table, printed = command(*arguments)

    def total(name: Path | str) -> list[np.ndarray]:
        other = type(model).from_pretrained(name, dtype=torch.float32).eval()
        pairs = [encode_pair(tokenizer, *pair, False, "{post}") for pair in zip(PROMPTS, texts, strict=True)]
        with torch.inference_mode():
            return [np.array(log_probs_one_by_one(other, *pair, k=257)[0]) for pair in pairs]

    reference, other = total(reference_path), total(other_path)
    per_token = np.mean([each.mean() for each in reference])
    for method in ("ARGS", "TOP-K", "DPO", "BESTN"):
        assert table.loc[method, "log_likelihood_per_token"] == pytest.approx(per_token, rel=1e-4)
    assert table.loc["ARGS", "sampled_kl"] == pytest.approx(
        np.mean([-each.sum() for each in reference]), rel=1e-4
    )
    assert table.loc["TOP-K", "sampled_kl"] == pytest.approx(
        0, abs=1e-3
    )  # the whole vocabulary: no truncation
    difference = np.mean([b.sum() - a.sum() for a, b in zip(reference, other, strict=True)])
    assert table.loc["DPO", "sampled_kl"] == pytest.approx(difference, rel=1e-3)
    assert np.isnan(table.loc["BESTN", "sampled_kl"]) and "no KL for BESTN" in printed

    # A text outside the top-k was not sampled with these tokens: named, not averaged.
    _, printed = command("--policy", reference_path, "--k", 1)
    assert "TOP-K: KL: no value for 4 of 4 responses" in printed


def test_no_flags_no_network_and_nothing_in_the_source_tree(tmp_path):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4], PARGS=[2, 2, 5, 3])
    write_responses(tmp_path, "args", ["a b", "c", "d", "e"])
    before = {path for path in EVALUATION.iterdir() if path.name != "__pycache__"}
    # Any name on the network resolves to a proxy that is not there.
    environment = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, EVALUATION / "show_result.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "wrote average_reward.csv" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= OUTPUTS
    assert before == {path for path in EVALUATION.iterdir() if path.name != "__pycache__"}


def test_unknown_flag_and_help(tmp_path, command, capsys):
    write_rewards(tmp_path, ARGS=[1, 2, 3, 4])
    with pytest.raises(SystemExit) as stopped:
        command("--no_such_flag", "1")
    assert stopped.value.code == 2 and "unknown arguments: --no_such_flag" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    assert stopped.value.code == 0 and "--pargs_weight" in capsys.readouterr().out
