"""The fast loop against the plain reference, and every method on models small enough to enumerate."""

from collections import Counter
from dataclasses import replace

import pytest
import reward_scoring
import torch
from conftest import ROOT, save
from PARGS_baselines import (
    METHODS,
    Row,
    Settings,
    choose,
    decode_method,
    decode_wave,
    evaluate,
    finished_responses,
    load_policy,
    make_guide,
    pick_best,
    run_method,
    top_candidates,
    uniform,
)
from reference import assert_same_tokens, reference_response, reference_reward
from reward_scoring import (
    CachedGuide,
    RereadingGuide,
    Written,
    fit_pair,
    load_reward_model,
    micro_batch_size,
    score_pairs,
)
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

TEMPLATE = "POST: {post}\nTL;DR:"
PAIRS = [
    ("gpt2", "deberta"),
    ("llama", "bert"),
    ("gpt2", "gpt2-reward"),
    ("llama", "llama-reward"),
    ("words", "bert"),
    ("words", "words-reward"),
    ("demo", "demo-deberta"),
]


@pytest.fixture(scope="session")
def word_models(tmp_path_factory) -> dict[str, str]:
    """A policy and a causal reward model over seven words and EOS, which comes up often."""
    root = tmp_path_factory.mktemp("words")
    vocabulary = ["<eos>", "POST", ":", "TL;DR", "cat", "dog", "sister", "bike"]
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="cat"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="cat")
    tokenizer.model_max_length = 128

    torch.manual_seed(1)
    config = {
        "vocab_size": 8,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    reward_config = GPT2Config(**config, num_labels=1, pad_token_id=0)
    return {
        "words": save(GPT2LMHeadModel(GPT2Config(**config)), tokenizer, root / "policy"),
        "words-reward": save(GPT2ForSequenceClassification(reward_config), tokenizer, root / "reward"),
    }


@pytest.fixture(scope="session")
def folders(small_models, word_models) -> dict[str, str]:
    demo = ROOT / "demo/models"
    trained = {"demo": str(demo / "summariser"), "demo-deberta": str(demo / "full-reward-model")}
    return {**small_models, **word_models, **trained}


def make_settings(folders, policy="gpt2", reward="deberta", **changes) -> Settings:
    names = {
        "policy": folders[policy],
        "dpo_policy": folders[policy],
        "ppo_policy": folders[policy],
        "full_reward_model": folders[reward],
        "partial_reward_model": folders[reward],
    }
    return Settings(**{"k": 5, "max_new_tokens": 10, "best_of": 4, **names, **changes})


def write(method: str, prompts: list[str], settings: Settings) -> dict[str, tuple[list[int], str]]:
    rows, _ = decode_method(method, prompts, TEMPLATE, settings)
    return {row.prompt: (row.ids, row.finish_reason) for row in rows}


@pytest.mark.parametrize("method", ["ARGS", "PARGS-G", "PARGS", "TOP-K"])
@pytest.mark.parametrize(("policy_name", "reward_name"), PAIRS)
def test_fast_path_writes_the_reference_tokens(folders, prompts, policy_name, reward_name, method):
    settings = make_settings(folders, policy_name, reward_name)
    written = write(method, prompts, settings)

    how = METHODS[method]
    policy = AutoModelForCausalLM.from_pretrained(folders[policy_name]).eval()
    policy_tokenizer = AutoTokenizer.from_pretrained(folders[policy_name])
    reward_model = AutoModelForSequenceClassification.from_pretrained(folders[reward_name]).eval()
    compared = 0
    for prompt in prompts:
        steps = reference_response(
            policy,
            policy_tokenizer,
            prompt,
            settings.k,
            settings.max_new_tokens,
            eos=policy_tokenizer.eos_token_id,
            reward_model=reward_model if how.guide else None,
            reward_tokenizer=AutoTokenizer.from_pretrained(folders[reward_name]),
            causal=reward_name.endswith("-reward"),
            weight=getattr(settings, how.weight) if how.weight else 0.0,
            uniforms=None
            if how.greedy
            else lambda step, prompt=prompt: uniform(settings.seed, method, prompt, 0, step),
        )
        ids, reason = written[prompt]
        compared += assert_same_tokens(steps, ids, policy_tokenizer.eos_token_id, reason == "eos")
    assert compared > 2 * len(prompts)


def test_guides_are_chosen_by_the_reward_model(folders):
    for policy_name, reward_name in PAIRS:
        settings = make_settings(folders, policy_name, reward_name)
        policy = load_policy(settings.policy, torch.float32, torch.device("cpu"))
        guide = make_guide(METHODS["ARGS"], policy, TEMPLATE, settings)
        assert type(guide) is (CachedGuide if reward_name.endswith("-reward") else RereadingGuide)


@pytest.mark.parametrize("method", ["ARGS", "PARGS", "BESTN", "TOP-K"])
@pytest.mark.parametrize(("policy_name", "reward_name"), [("gpt2", "deberta"), ("words", "words-reward")])
def test_tokens_do_not_depend_on_company(folders, prompts, policy_name, reward_name, method):
    def responses(prompts, **changes):
        settings = make_settings(folders, policy_name, reward_name, **changes)
        rows, _ = decode_method(method, prompts, TEMPLATE, settings)
        return sorted((row.prompt, row.sample, row.ids) for row in rows)

    together = responses(prompts)
    assert responses(prompts[::-1]) == together
    assert responses(prompts, cache_gb=1e-9) == together  # one prompt a wave
    assert responses(prompts, token_budget=1) == together  # one sequence a micro-batch
    alone = responses(prompts[2:3])
    assert alone and all(response in together for response in alone)


def test_a_device_map_changes_nothing_on_one_device(folders, prompts):
    settings = make_settings(folders, "gpt2", "gpt2-reward")
    assert write("PARGS", prompts, replace(settings, device_map="auto")) == write("PARGS", prompts, settings)


def test_causal_reward_model_without_shared_ids_rereads_text(folders, prompts):
    settings = make_settings(folders, "words", "gpt2-reward", max_new_tokens=4)
    written = write("ARGS", prompts[:2], settings)

    policy_tokenizer = AutoTokenizer.from_pretrained(folders["words"])
    policy = AutoModelForCausalLM.from_pretrained(folders["words"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2-reward"])
    model = AutoModelForSequenceClassification.from_pretrained(folders["gpt2-reward"]).eval()
    for prompt in prompts[:2]:
        ids, reason = written[prompt]
        prompt_ids = policy_tokenizer(prompt)["input_ids"]
        log_probs = policy(torch.tensor([prompt_ids])).logits[0, -1].log_softmax(-1)
        scores = {}
        for token in log_probs.topk(settings.k).indices.tolist():
            end = [tokenizer.eos_token_id] if token == policy_tokenizer.eos_token_id else []
            text = "" if end else policy_tokenizer.decode([token])
            inputs = torch.tensor([tokenizer(prompt + text)["input_ids"] + end])
            hidden = model.transformer(inputs).last_hidden_state[0, -1]
            scores[token] = (log_probs[token] + model.score(hidden)[0]).item()
        assert max(scores, key=scores.get) == [*ids, policy_tokenizer.eos_token_id][0]


def test_a_candidate_that_ends_the_response_is_scored_as_finished(folders, prompts):
    """Also where the text is read afresh: with the EOS of the reward model's own tokenizer."""
    settings = make_settings(folders, "words", "gpt2-reward")
    policy = load_policy(settings.policy, torch.float32, torch.device("cpu"))
    guide = make_guide(METHODS["ARGS"], policy, TEMPLATE, settings)
    guide.begin(prompts[:1])
    eos, bike, dog = policy.tokenizer.convert_tokens_to_ids(["<eos>", "bike", "dog"])
    rewards = guide.score([[bike]], [[eos, dog]], torch.tensor([[eos, dog]]))[0].tolist()

    model = AutoModelForSequenceClassification.from_pretrained(folders["gpt2-reward"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2-reward"])
    start = tokenizer(prompts[0])["input_ids"]
    responses = tokenizer("bike")["input_ids"] + [tokenizer.eos_token_id], tokenizer("bikedog")["input_ids"]
    for reward, response in zip(rewards, responses, strict=True):
        ids = start + response
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=1e-4)


def test_running_out_of_memory_halves_the_micro_batch(folders, prompts, monkeypatch, capsys):
    """No GPU here: reading more than two sequences at once is made to fail as it does there."""
    reward_model = load_reward_model(folders["bert"], torch.float32, torch.device("cpu"), token_budget=10**6)
    pairs = [[5, 6, 7]] * 9, [[8 + at, 9] for at in range(9)]
    expected = score_pairs(reward_model, *pairs, reserved=4)
    whole, most = reward_scoring.read_batch, 2

    def read_few(reward_model, inputs, segments):
        if len(inputs) > most:
            raise torch.cuda.OutOfMemoryError
        return whole(reward_model, inputs, segments)

    monkeypatch.setattr(reward_scoring, "read_batch", read_few)
    torch.testing.assert_close(score_pairs(reward_model, *pairs, reserved=4), expected, rtol=0, atol=1e-5)
    most = 0
    with pytest.raises(SystemExit):
        score_pairs(reward_model, *pairs, reserved=4)
    assert "runs out of memory" in capsys.readouterr().err


def test_a_guide_that_leaves_no_room_for_the_prompt_is_refused(folders, capsys):
    settings = make_settings(folders, "gpt2", "bert")
    policy = load_policy(settings.policy, torch.float32, torch.device("cpu"))
    with pytest.raises(SystemExit):
        make_guide(METHODS["ARGS"], policy, TEMPLATE, replace(settings, max_new_tokens=253))
    assert "no prompt fits beside --max_new_tokens" in capsys.readouterr().err


# The distribution of a sampled token


@pytest.mark.parametrize(("method", "weight"), [("PARGS", 2.0), ("TOP-K", 0.0)])
@pytest.mark.parametrize("k", [3, 50])
def test_sampled_tokens_follow_the_tilted_distribution(folders, method, weight, k):
    """k = 50 is more than the vocabulary of 8, so everything can be drawn."""
    prompt, draws = "POST: cat\nTL;DR:", 4000
    settings = make_settings(folders, "words", "words-reward", k=k, max_new_tokens=1)
    policy = load_policy(settings.policy, torch.float32, torch.device("cpu"))
    prompt_ids = policy.tokenizer(prompt)["input_ids"]
    rows = [Row(prompt, prompt_ids, sample) for sample in range(draws)]
    guide = make_guide(METHODS[method], policy, TEMPLATE, settings) if METHODS[method].guide else None
    for _ in decode_wave(policy, rows, draws, settings, method, guide):
        pass

    reward_model = AutoModelForSequenceClassification.from_pretrained(folders["words-reward"]).eval()
    log_probs = policy.model(torch.tensor([prompt_ids])).logits[0, -1].log_softmax(-1)
    top = log_probs.topk(min(k, 8)).indices.tolist()
    scores = torch.tensor(
        [
            log_probs[token].item()
            + weight * reference_reward(reward_model, None, True, policy.tokenizer, prompt, [token])
            for token in top
        ]
    )
    expected = dict(zip(top, (scores.double().softmax(0) * draws).tolist(), strict=True))

    eos = policy.tokenizer.eos_token_id
    observed = Counter((row.ids or [eos])[0] for row in rows)
    assert set(observed) <= set(top)
    likely = [token for token in top if expected[token] >= 5]
    assert len(likely) >= 2
    rest = draws - sum(expected[token] for token in likely)
    counts = [observed[token] for token in likely] + [draws - sum(observed[token] for token in likely)]
    expectations = [expected[token] for token in likely] + [rest]
    if rest < 1e-6 * draws:
        counts, expectations = counts[:-1], expectations[:-1]
    scale = sum(counts) / sum(expectations)
    assert chisquare(counts, [value * scale for value in expectations]).pvalue > 1e-3


def test_candidates_are_normalised_over_the_whole_vocabulary():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0, 2.0]])
    candidates, log_probs = top_candidates(logits, 3)
    assert candidates.tolist() == [[1, 2, 4]]  # equal ones by rising id
    torch.testing.assert_close(log_probs[0], logits[0].log_softmax(0)[[1, 2, 4]])
    assert log_probs.exp().sum() < 1

    everything, _ = top_candidates(logits, 99)
    assert everything.tolist() == [[1, 2, 4, 0, 3]]


def test_choice_is_the_first_best_or_the_inverse_cdf():
    scores = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]], dtype=torch.float64)
    assert choose(scores, None).tolist() == [1, 0]

    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.9999999], dtype=torch.float64)
    assert choose(probabilities, uniforms).tolist() == [0, 0, 1, 1, 2]

    broken = torch.tensor([[0.0, torch.nan, 1.0]], dtype=torch.float64)
    assert choose(broken, None).tolist() == choose(broken, uniforms[:1]).tolist() == [-1]


def test_uniform_numbers_belong_to_their_step():
    drawn = {
        uniform(seed, method, prompt, sample, step)
        for seed in (0, 1)
        for method in ("PARGS", "TOP-K")
        for prompt in ("a", "b")
        for sample in (0, 1)
        for step in range(50)
    }
    assert len(drawn) == 800 and all(0 <= number < 1 for number in drawn)
    assert 0.45 < sum(drawn) / len(drawn) < 0.55
    assert uniform(0, "PARGS", "a", 0, 0) == uniform(0, "PARGS", "a", 0, 0)


# Best of n


def test_best_of_n_samples_differ_and_the_best_is_kept(folders, prompts):
    settings = make_settings(folders, "gpt2", "deberta", best_of=6)
    rows, tokenizer = decode_method("BESTN", prompts, TEMPLATE, settings)
    best = pick_best(rows, 6, tokenizer, TEMPLATE, settings)
    assert [row.prompt for row in best] == prompts

    reward_model = AutoModelForSequenceClassification.from_pretrained(folders["deberta"]).eval()
    reward_tokenizer = AutoTokenizer.from_pretrained(folders["deberta"])
    for group, winner in enumerate(best):
        samples = rows[group * 6 : group * 6 + 6]
        assert len({tuple(row.ids) for row in samples}) > 3
        rewards = [
            reference_reward(reward_model, reward_tokenizer, False, tokenizer, winner.prompt, row.ids)
            for row in samples
        ]
        assert rewards[samples.index(winner)] == pytest.approx(max(rewards), abs=1e-5)


# Rewards


@pytest.mark.parametrize("reward_name", ["deberta", "bert", "gpt2-reward", "llama-reward"])
def test_rewards_in_files_are_those_of_the_finished_response(folders, prompts, reward_name):
    settings = make_settings(folders, "gpt2", reward_name)
    results = run_method("TOP-K", prompts, TEMPLATE, settings)
    alone = run_method("TOP-K", prompts[3:4], TEMPLATE, settings)
    assert alone == results[3:4]

    model = AutoModelForSequenceClassification.from_pretrained(folders[reward_name]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[reward_name])
    policy_tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    rows, _ = decode_method("TOP-K", prompts, TEMPLATE, settings)
    for row, result in zip(rows, results, strict=True):
        causal = reward_name.endswith("-reward")
        ids = row.ids + [policy_tokenizer.eos_token_id] * causal
        expected = reference_reward(model, tokenizer, causal, policy_tokenizer, row.prompt, ids)
        assert result["reward"] == pytest.approx(expected, abs=2e-4)
        assert result["num_tokens"] == len(row.ids)


def test_read_out_is_by_length_where_pad_is_eos(folders):
    """A batch of responses that end in EOS, padded with EOS: the reward is the one read at the EOS."""
    reward_model = load_reward_model(
        folders["gpt2-reward"], torch.float32, torch.device("cpu"), token_budget=10_000
    )
    assert reward_model.tokenizer.pad_token_id in (None, reward_model.tokenizer.eos_token_id)
    eos = reward_model.tokenizer.eos_token_id
    prompts, responses = [[5, 6, 7]] * 3, [[8, 9, eos], [8, eos], [8, 9]]
    together = score_pairs(reward_model, prompts, responses, reserved=4)
    for at in range(3):
        alone = torch.tensor([prompts[at] + responses[at]])
        hidden = reward_model.model.transformer(alone).last_hidden_state[0, -1]
        torch.testing.assert_close(
            together[at], reward_model.model.score(hidden)[0], rtol=0, atol=1e-4, check_dtype=False
        )
    assert len({round(reward, 3) for reward in together.tolist()}) == 3


def test_micro_batches_hold_little_padding():
    assert micro_batch_size([100] * 50, token_budget=1000) == 10
    assert micro_batch_size([100] * 4, token_budget=1000) == 4
    assert micro_batch_size([100, 100, 95, 89, 89], token_budget=1000) == 3
    # A batch below an eighth of the budget is not worth a pass of its own.
    assert micro_batch_size([100, 50, 50, 50], token_budget=1600) == 2
    assert micro_batch_size([5000, 50], token_budget=1000) == 1


def test_references_and_own_responses_are_encoded_alike(folders, prompts):
    """For a causal reward model, text given and the same text written by the policy score the same."""
    settings = make_settings(folders, "gpt2", "gpt2-reward")
    policy = load_policy(settings.policy, torch.float32, torch.device("cpu"))
    reward_model = load_reward_model(
        folders["gpt2-reward"], torch.float32, torch.device("cpu"), token_budget=1000
    )
    text = " my sister sold my bike"
    row = Row(prompts[0], [], 0, ids=policy.tokenizer(text)["input_ids"])
    (own,) = finished_responses([row], reward_model, policy.tokenizer)
    assert own.ids is not None
    given = Written(text, finished=True)
    rewards = evaluate(reward_model, [prompts[0]] * 2, [own, given], TEMPLATE, reserved=11)
    assert rewards[0] == rewards[1]


def test_long_prompts_lose_their_beginning_and_keep_room(folders):
    reward_model = load_reward_model(folders["bert"], torch.float32, torch.device("cpu"), token_budget=1000)
    long = list(range(5, 305))
    room = 256 - reward_model.frame.num_special

    def fit(prompt_ids, response_ids):
        return fit_pair(reward_model, prompt_ids, response_ids, reserved=11)

    assert fit(long, [1, 2, 3]) == (long[-(room - 11) :], [1, 2, 3])
    assert fit(long, long[:40]) == (long[-(room - 40) :], long[:40])
    assert fit(long[:20], [1, 2, 3]) == (long[:20], [1, 2, 3])
    assert fit(long, long) == ([], long[:room])

    causal = load_reward_model(folders["gpt2-reward"], torch.float32, torch.device("cpu"), token_budget=1000)
    eos = [causal.tokenizer.eos_token_id]
    assert fit_pair(causal, long, long + eos, reserved=11) == ([], long[:255] + eos)

    settings = make_settings(folders, "gpt2", "bert", max_new_tokens=3)
    post = "POST: " + "my sister sold my bike and " * 60 + "\nTL;DR:"
    rows, _ = decode_method("ARGS", [post], TEMPLATE, settings)
    assert len(rows[0].prompt_ids) == 256 - 3 and len(rows[0].ids) == 3


def test_nan_reward_is_named_with_its_prompt(folders, prompts, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(folders["gpt2-reward"])
    model.score.weight.data[:] = torch.nan
    broken = save(model, AutoTokenizer.from_pretrained(folders["gpt2-reward"]), tmp_path / "broken")
    settings = replace(make_settings(folders), partial_reward_model=broken)
    with pytest.raises(SystemExit) as stopped:
        decode_method("PARGS", prompts, TEMPLATE, settings)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "NaN" in message and any(repr(prompt) in message for prompt in prompts)


def test_trace_holds_every_step(folders, prompts):
    settings = make_settings(folders, "gpt2", "deberta", trace=True)
    rows, tokenizer = decode_method("PARGS", prompts[:2], TEMPLATE, settings)
    for row in rows:
        assert len(row.steps) == len(row.ids) + (row.finish_reason == "eos")
        for step, token in zip(row.steps, row.ids, strict=False):
            assert step["tokens"][step["chosen"]] == tokenizer.decode([token])
            assert len(step["tokens"]) == len(step["log_probs"]) == len(step["rewards"]) == settings.k
            assert step["log_probs"] == sorted(step["log_probs"], reverse=True)
