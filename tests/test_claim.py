"""The study of the claim: what reward models train on, what arms record, what candidates are worth."""

import json
from dataclasses import replace
from pathlib import Path

import arms
import candidates
import claim_figures
import make_posts
import numpy as np
import pandas as pd
import pytest
import reward_models
import tldr_data_process
import tldr_data_process_partial
import torch
import train_models
from conftest import ROOT
from prompts import load_prompts
from quality import true_quality
from responses import Response
from run_models import get_policy
from small_runs import run_script

from pargs.models import load_reward_model
from pargs.scoring import score_pairs

MODELS = ROOT / "demo/models"
SIZES = ["--train_pairs", 40, "--validation_pairs", 8, "--test_posts", 4, "--articles", 0]


@pytest.fixture(autouse=True)
def own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study adds its arms to the methods of stage 4: other tests see none of them."""
    monkeypatch.setattr(arms.decoding, "METHODS", dict(arms.decoding.METHODS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world, and what a decoder-only reward model trains on in it."""
    folder = tmp_path_factory.mktemp("claim")
    run_script(make_posts, folder, ".", *SIZES)
    run_script(tldr_data_process, folder)
    run_script(
        tldr_data_process_partial, folder, "--reward_model", MODELS / "summariser", "--output", "causal-4000"
    )
    return folder


@pytest.mark.parametrize("eos", [True, False])
def test_a_full_model_trains_on_the_token_that_it_is_asked_at(eos: bool) -> None:
    """What the classifier reads in a padded batch is what pargs reads: the EOS, or the last token without."""
    torch.manual_seed(0)
    reward_model, padding = train_models.start_reward_model(MODELS / "summariser", eos)
    own = load_reward_model(str(MODELS / "causal-reward-model"), torch.float32, "cpu", 1000)
    own.model.load_state_dict(reward_model.state_dict())

    end = [own.tokenizer.eos_token_id] * eos
    prompts, responses = [[40, 50, 60], [70, 80, 90]], [[41, 42, 43, 44, *end], [45, *end]]
    batch = padding.pad(
        {"input_ids": [p + r for p, r in zip(prompts, responses, strict=True)]}, return_tensors="pt"
    )
    with torch.no_grad():
        trained_on = reward_model.eval()(**batch).logits[:, 0]
    torch.testing.assert_close(trained_on, score_pairs(own, prompts, responses, 0))


@pytest.mark.slow
def test_a_full_model_learns_the_pairs_of_the_prefix_dataset(data: Path, tmp_path: Path) -> None:
    rates = {"max_steps": 60, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    reward_models.train_full(data / "causal-4000", MODELS / "summariser", tmp_path / "full-s1", 1, rates)
    own = load_reward_model(str(tmp_path / "full-s1"), torch.float32, "cpu", 4000)
    pairs = reward_models.load_from_disk(str(data / "causal-4000/pairs"))["train"]
    sides = [score_pairs(own, pairs["prompt_ids"][:], pairs[f"{side}_ids"][:], 0) for side in arms.SIDES]
    assert (sides[0] > sides[1]).float().mean() > 0.9
    assert own.tokenizer.pad_token is None


@pytest.mark.slow
def test_an_arm_records_what_came_of_it(data: Path, tmp_path: Path) -> None:
    guide = str(MODELS / "causal-reward-model")
    asked = [arms.Arm("full closed", guide, 1.0, "always"), arms.Arm("partial", guide, 2.0, greedy=False)]
    arms.decode_arms(data, asked, "encoder", tmp_path / "arms.json")
    arms.decode_unguided(data, tmp_path / "unguided.json")
    greedy, sampled = json.loads((tmp_path / "arms.json").read_text())
    unguided = json.loads((tmp_path / "unguided.json").read_text())

    facts = arms.read_facts(data / "demo_facts.json")
    settings = arms.make_settings(data)
    prompts, _, template = load_prompts(settings.dataset, None, 0, 0)
    for arm in (greedy, sampled, unguided[0]):
        known = arms.facts_of_prompts(facts, prompts)
        qualities = [true_quality(text, own)["total"] for text, own in zip(arm["text"], known, strict=True)]
        assert arm["quality"] == pytest.approx(qualities, abs=1e-4)
        assert all(log_p < 0 for log_p in arm["log_p"]) and len(arm["reward"]) == 4
    assert greedy["log_q"] == [0] * 4 == unguided[0]["log_q"]
    assert greedy["text"] != unguided[0]["text"]

    # The sampled arm's own log-probability, from plain forward passes: every EOS and prefix as trained.
    policy = get_policy(arms.POLICY, settings)
    name, settings = "partial, w = 2", replace(settings, seed=11)
    response = arms.decoding.decode_method(name, prompts, template, settings).responses[0]
    own = load_reward_model(guide, torch.float32, "cpu", 4000)
    total = 0.0
    for at, token in enumerate(response.written_ids):
        before = response.prompt_ids + response.ids[:at]
        log_probs = policy.model(torch.tensor([before])).logits[0, -1].log_softmax(-1)
        top = log_probs.topk(10)
        continued = [[*response.ids[:at], candidate] for candidate in top.indices.tolist()]
        rewards = score_pairs(own, [response.prompt_ids] * 10, continued, 0)
        scores = (top.values + 2 * rewards).log_softmax(-1)
        total += scores[top.indices.tolist().index(token)].item()
    assert sampled["log_q"][0] == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize(
    ("guide_eos", "expected"),
    [("finished", [[5, 0], [5]]), ("always", [[5, 0], [5, 0]]), ("never", [[5], [5]])],
)
def test_prefixes_are_ranked_as_the_guide_reads_them(guide_eos: str, expected: list) -> None:
    own = load_reward_model(str(MODELS / "causal-reward-model"), torch.float32, "cpu", 1000)
    assert own.tokenizer.eos_token_id == 0
    assert [arms.read_as(own, prefix, guide_eos) for prefix in ([5, 0], [5])] == expected


@pytest.mark.slow
def test_the_best_of_n_is_the_best_of_the_first_n(data: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "results").mkdir()
    names = ("quality", "reward", "causal_reward", "tokens", "eos", "log_p", "log_q")
    samples = {name: list(range(16)) for name in names} | {"ids": [[at] for at in range(16)]}
    row = samples | {"samples": 4, "sampling_seed": 1}
    (tmp_path / "results/unguided.json").write_text(json.dumps([row]))
    monkeypatch.setattr(arms, "NUM_SAMPLES", (1, 2, 4))
    rewards = [3, 9, 1, 8, 0, 1, 7, 2, 5, 4, 3, 6, 1, 1, 1, 2]
    monkeypatch.setattr(arms, "rewards_of", lambda *_: rewards)
    output = tmp_path / "results/best.json"
    arms.choose_best(data, tmp_path, ("full",), 1, output)
    chosen = {row["n"]: row["quality"] for row in json.loads(output.read_text())}
    assert chosen == {1: [0, 4, 8, 12], 2: [1, 5, 8, 12], 4: [1, 6, 11, 15]}


@pytest.mark.slow
def test_a_candidate_is_worth_what_the_policy_makes_of_it(data: Path) -> None:
    """An EOS is worth the summary that it ends; another candidate what is sampled behind it, on average."""
    settings = arms.make_settings(data, seed=3)
    policy = get_policy(arms.POLICY, settings)
    prompts, *_ = load_prompts(settings.dataset, None, 0, 0)
    facts = arms.facts_of_prompts(arms.read_facts(data / "demo_facts.json"), prompts[:1])
    ids = policy.tokenizer(prompts[0])["input_ids"]
    summary = policy.tokenizer(" My boss is difficult.")["input_ids"]
    state = Response(prompts[0], ids, 0, summary)
    ((ended, going_on),) = candidates.roll_out(policy, [state], [[0, 40]], facts, settings)
    assert ended == pytest.approx(true_quality(" My boss is difficult.", facts[0])["total"])
    assert 0 <= going_on <= 1


def test_arms_are_compared_prompt_by_prompt() -> None:
    """Seeds are averaged within a prompt before prompts are compared."""
    first = pd.DataFrame({"prompt": [0, 0, 1, 1], "quality": [1.0, 0.0, 0.5, 0.5]})
    second = pd.DataFrame({"prompt": [0, 1], "quality": [0.25, 0.0]})
    found = claim_figures.compare(first, second, "quality")
    assert found["difference"] == pytest.approx(0.375) and found["prompts"] == 2
    assert found["low"] == pytest.approx(0.25) and found["high"] == pytest.approx(0.5)
    by_seed = claim_figures.compare(first.assign(training_seed=[1, 2, 1, 2]), second, "quality")
    assert (by_seed["seed_1"], by_seed["seed_2"]) == pytest.approx((0.625, 0.125)) and "seed_3" not in by_seed
    described = claim_figures.describe(first.assign(training_seed=[1, 2, 1, 2]), "quality")
    assert described["quality"] == 0.5
    assert (described["quality_seed_min"], described["quality_seed_max"]) == (0.25, 0.75)
    assert np.isclose(described["quality_low"], 0.5)


def test_candidates_count_where_a_guide_can_decide() -> None:
    """Near candidates of clearly different value, alone and by log pi + w r; a post counts once."""
    state = {"post": [0, 0], "log_probs": [[-1.0, -2.0, -6.0], [-1.0, -1.5, -2.0]]}
    values = [[0.2, 0.8, 0.9], [0.5, 0.55, 0.9]]  # the third of the first is too improbable
    rewards = {"partial": {"1": [[0.0, 1.5, -9.0], [0.0, 0.0, -1.0]]}}
    pairs = claim_figures.judge_pairs(state | {"values": values, "rewards": rewards})
    right = pairs.set_index(["label", "weight"])["right"].to_dict()
    assert right["log pi", 0.0] == 0  # of three pairs: one of the first state, two of the second
    assert right["partial", np.inf] == pytest.approx(1 / 3)
    assert right["partial", 1.0] == pytest.approx(1 / 3)
    assert list(pairs["pairs"].unique()) == [3]


def test_going_on_is_weighed_against_ending(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    state = {"post": [0], "candidates": [[" and", ".", "", " my"]], "ends": [[False, False, True, False]]}
    state |= {"log_probs": [[-1.0, -1.5, -2.0, -3.0]], "values": [[0.2, 0.6, 0.4, 0.9]]}
    state["rewards"] = {"partial": {"1": [[1.0, 2.0, 4.0, 9.0]], "2": [[3.0, 2.0, 2.0, 9.0]]}}
    (tmp_path / "results/joints.json").write_text(json.dumps(state))
    table = claim_figures.joint_table(tmp_path).set_index("label")["going_on"]
    assert table.to_dict() == pytest.approx({"log pi": 0.75, "value": -0.3, "partial": -0.5})
