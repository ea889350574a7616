"""The fast loop against the plain reference, and every method on models small enough to enumerate."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import cache

import PARGS_baselines
import pytest
import torch
from conftest import ROOT, save, write_prompts
from final_rewards import finished_responses, pick_best
from guides import CachedGuide, RereadingGuide, make_guide
from PARGS_baselines import (
    METHODS,
    Settings,
    choose,
    decode_method,
    decode_wave,
    run_method,
    top_candidates,
    uniform,
)
from reference import Reference, assert_same_tokens
from responses import Response
from run_models import get_policy, get_reward_model
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

from pargs import scoring
from pargs.models import Policy, RewardModel, load_reward_model
from pargs.runs import (
    Cost,
    Method,
    generation_path,
    read_generations,
    read_methods,
    read_traces,
    trace_path,
)
from pargs.scoring import Continuation, fit_pair, micro_batch_size, score_finished, score_pairs

TEMPLATE = "POST: {post}\nTL;DR:"
CPU = torch.device("cpu")
PAIRS = [
    ("gpt2", "deberta"),
    ("llama", "bert"),
    ("gpt2", "gpt2-reward"),
    ("llama", "llama-reward"),
    ("words", "bert"),
    ("words", "words-reward"),
    ("words", "gpt2-reward"),  # decoder-only, with other ids
    ("demo", "demo-deberta"),
]
FAST_PAIRS = [("gpt2", "deberta"), ("words", "words-reward"), ("words", "gpt2-reward")]


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
    shape = {"vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = {**shape, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0}
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


@pytest.fixture(scope="session")
def reference(folders):
    """`reference(policy, reward)`: the plain loop with these models."""
    return cache(
        lambda policy, reward: Reference.load(folders[policy], folders[reward], reward.endswith("-reward"))
    )


def make_settings(folders, policy="gpt2", reward="deberta", **changes) -> Settings:
    names = {
        **dict.fromkeys(("policy", "dpo_policy", "ppo_policy"), folders[policy]),
        **dict.fromkeys(("full_reward_model", "partial_reward_model"), folders[reward]),
    }
    return Settings(**{"k": 5, "max_new_tokens": 10, "best_of": 4, **names, **changes})


def decode(method: str, prompts: list[str], settings: Settings) -> list[Response]:
    return decode_method(method, prompts, TEMPLATE, settings).responses


def compare_with_reference(
    method: str, prompts: list[str], settings: Settings, plain: Reference, eos: Collection[int] = ()
) -> int:
    """Every response is the reference's, token for token; returns how many tokens were compared."""
    how, eos = METHODS[method](settings), eos or {plain.tokenizer.eos_token_id}
    compared = 0
    for response in decode(method, prompts, settings):

        def drawn(step: int, prompt: str = response.prompt) -> float:
            return uniform(settings.seed, method, prompt, 0, step)

        uniforms = None if how.greedy else drawn
        gap = settings.candidate_gap or math.inf
        steps = plain.write(
            response.prompt,
            settings.k,
            settings.max_new_tokens,
            how.weight,
            uniforms,
            eos,
            how.guide_eos,
            gap,
        )
        compared += assert_same_tokens(steps, response.written_ids)
    return compared


def guided_policy(settings: Settings) -> tuple[Policy, RewardModel, RereadingGuide | CachedGuide]:
    policy = get_policy(settings.policy, settings)
    reward_model = get_reward_model(settings.full_reward_model, settings)
    return policy, reward_model, make_guide(reward_model, policy, TEMPLATE, settings.max_new_tokens)


def load(folders, name: str) -> RewardModel:
    return load_reward_model(folders[name], torch.float32, CPU, token_budget=10_000)


# Token for token


@pytest.mark.parametrize("method", ["ARGS", "PARGS-G", "PARGS", "TOP-K", "GREEDY"])
@pytest.mark.parametrize(
    ("policy_name", "reward_name"),
    [pytest.param(*pair, marks=[] if pair in FAST_PAIRS else pytest.mark.slow) for pair in PAIRS],
)
def test_fast_path_writes_the_reference_tokens(folders, prompts, reference, policy_name, reward_name, method):
    settings, plain = make_settings(folders, policy_name, reward_name), reference(policy_name, reward_name)
    assert compare_with_reference(method, prompts, settings, plain) > 2 * len(prompts)


@pytest.mark.parametrize("guide_eos", ["always", "never"])
@pytest.mark.parametrize(
    ("policy_name", "reward_name"),
    [("words", "words-reward"), ("words", "gpt2-reward"), ("gpt2", "gpt2-reward"), ("gpt2", "deberta")],
)
def test_where_a_guide_reads_an_eos_is_a_setting(
    folders, prompts, reference, capsys, policy_name, reward_name, guide_eos
):
    settings = make_settings(folders, policy_name, reward_name, args_eos=guide_eos, args_weight=3.0)
    compare_with_reference("ARGS", prompts, settings, reference(policy_name, reward_name))
    written, as_trained = (
        [response.written_ids for response in decode("ARGS", prompts, each)]
        for each in (settings, replace(settings, args_eos="finished"))
    )
    # An encoder reads no EOS, and this policy proposes none.
    same = reward_name == "deberta" or (policy_name == "gpt2" and guide_eos == "never")
    assert (written == as_trained) == same
    assert "cannot use a key-value cache" not in capsys.readouterr().err  # or the cache was not tested


@pytest.mark.parametrize("method", ["ARGS", "PARGS", "TOP-K"])
@pytest.mark.parametrize(
    ("policy_name", "reward_name"), [("gpt2", "deberta"), ("words", "words-reward"), ("gpt2", "gpt2-reward")]
)
def test_a_gap_leaves_candidates_out(folders, prompts, reference, policy_name, reward_name, method):
    """They are not written, and the guide is not asked about them, nor where one candidate is left."""
    plain, settings = reference(policy_name, reward_name), make_settings(folders, policy_name, reward_name)
    without = [response.written_ids for response in decode(method, prompts, settings)]
    counts, written = set(), []
    for gap in (0.05, 0.5, 4.0):
        own = replace(settings, candidate_gap=gap, trace=True)
        assert compare_with_reference(method, prompts, own, plain) > len(prompts)
        reward_model = get_reward_model(own.full_reward_model, own)
        reward_model.calls = 0
        responses = decode(method, prompts, own)
        steps = [step for response in responses for step in response.steps]
        kept = [[value is not None for value in step["log_probs"]] for step in steps]
        counts |= {sum(each) for each in kept}
        if method != "TOP-K":
            asked = [[value is not None for value in step["rewards"]] for step in steps]
            assert asked == [each if sum(each) > 1 else [False] * 5 for each in kept]
            assert sum(map(sum, asked)) <= reward_model.calls <= sum(map(sum, asked)) + 100  # and the probe
            assert sum(map(sum, kept)) == sum(response.num_candidates for response in responses)
        written.append([response.written_ids for response in responses])
    assert method == "ARGS" or any(each != without for each in written)  # greedy choices may all be near
    assert method == "TOP-K" or (1 in counts and counts & {2, 3, 4})


def test_the_last_candidate_that_is_left_has_the_rest():
    scores = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    assert choose(scores, torch.tensor([1.0], dtype=torch.float64)).item() == 1


def test_guides_are_chosen_by_the_reward_model(folders):
    for policy_name, reward_name in PAIRS:
        *_, guide = guided_policy(make_settings(folders, policy_name, reward_name))
        shared = reward_name.endswith("-reward") and (policy_name, reward_name) != ("words", "gpt2-reward")
        assert type(guide) is (CachedGuide if shared else RereadingGuide)


@pytest.mark.parametrize("method", ["ARGS", "PARGS", "BESTN", "TOP-K"])
@pytest.mark.parametrize(
    ("policy_name", "reward_name"),
    [pytest.param("gpt2", "deberta", marks=pytest.mark.slow), ("words", "words-reward")],
)
def test_tokens_do_not_depend_on_company(folders, prompts, policy_name, reward_name, method):
    def written(prompts, **changes):
        settings = make_settings(folders, policy_name, reward_name, **changes)
        return sorted((each.prompt, each.sample, each.ids) for each in decode(method, prompts, settings))

    together = written(prompts)
    assert written(prompts[::-1]) == together
    assert written(prompts, cache_gb=1e-9) == together  # one prompt a wave
    assert written(prompts, token_budget=1) == together  # one sequence a micro-batch
    alone = written(prompts[2:3])
    assert alone and all(response in together for response in alone)


def test_a_device_map_changes_nothing_on_one_device(folders, prompts):
    settings = make_settings(folders, "gpt2", "gpt2-reward")
    assert decode("PARGS", prompts, replace(settings, device_map="auto")) == decode(
        "PARGS", prompts, settings
    )


# Choosing a token


@pytest.mark.parametrize(("method", "weight"), [("PARGS", 2.0), ("TOP-K", 0.0)])
@pytest.mark.parametrize("k", [3, 50])
def test_sampled_tokens_follow_the_tilted_distribution(folders, reference, method, weight, k):
    """k = 50 is more than the vocabulary of 8, so everything can be drawn."""
    prompt, draws = "POST: cat\nTL;DR:", 4000
    settings = make_settings(folders, "words", "words-reward", k=k, max_new_tokens=1)
    policy, _, guide = guided_policy(settings)
    prompt_ids = policy.tokenizer(prompt)["input_ids"]
    responses = [Response(prompt, prompt_ids, sample) for sample in range(draws)]
    how = METHODS[method](settings)
    for _ in decode_wave(method, how, policy, guide if how.guide else None, responses, settings):
        pass

    plain, eos = reference("words", "words-reward"), policy.tokenizer.eos_token_id
    log_probs = plain.log_probs(prompt_ids)
    top = log_probs.topk(min(k, 8)).indices.tolist()
    scores = [log_probs[token].item() + weight * plain.reward(prompt, [token]) for token in top]
    expected = dict(zip(top, (torch.tensor(scores).double().softmax(0) * draws).tolist(), strict=True))

    observed = Counter((response.ids or [eos])[0] for response in responses)
    assert set(observed) <= set(top)
    likely = [token for token in top if expected[token] >= 5]
    assert len(likely) >= 2
    counts, expectations = [observed[token] for token in likely], [expected[token] for token in likely]
    if draws - sum(expectations) > 1e-6 * draws:  # the unlikely ones together
        counts.append(draws - sum(counts))
        expectations.append(draws - sum(expectations))
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


@pytest.mark.parametrize(
    ("broken", "weights", "value"),
    [
        ("gpt2-reward", "score.weight", torch.nan),
        ("gpt2-reward", "score.weight", torch.inf),
        ("gpt2", "transformer.ln_f.bias", torch.nan),
    ],
)
def test_numbers_that_are_none_are_named_with_their_prompt(
    folders, prompts, tmp_path, capsys, broken, weights, value
):
    auto = AutoModelForCausalLM if broken == "gpt2" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folders[broken])
    model.get_parameter(weights).data[:] = value
    names = dict(folders, **{broken: save(model, AutoTokenizer.from_pretrained(folders[broken]), tmp_path)})
    with pytest.raises(SystemExit) as stopped:
        decode("PARGS", prompts[:1], make_settings(names, "gpt2", "gpt2-reward"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "NaN or infinite" in message and repr(prompts[0]) in message


# Rewards


@pytest.mark.parametrize("reward_name", ["deberta", "bert", "gpt2-reward", "llama-reward"])
def test_rewards_in_files_are_those_of_the_finished_response(folders, prompts, reference, reward_name):
    settings = make_settings(folders, "gpt2", reward_name)
    generations, *_ = run_method("TOP-K", prompts, TEMPLATE, settings)
    alone, *_ = run_method("TOP-K", prompts[3:4], TEMPLATE, settings)
    assert alone == generations[3:4]

    plain = reference("gpt2", reward_name)
    for response, generation in zip(decode("TOP-K", prompts, settings), generations, strict=True):
        finished = response.ids + [plain.tokenizer.eos_token_id] * plain.causal
        assert generation.reward == pytest.approx(plain.reward(response.prompt, finished), abs=2e-4)
        assert generation.num_tokens == len(response.ids)
        assert generation.finish_reason == response.finish_reason


def test_best_of_n_samples_differ_and_the_best_is_kept(folders, prompts, reference):
    settings = make_settings(folders, "gpt2", "deberta", best_of=6)
    plain, reward_model = reference("gpt2", "deberta"), get_reward_model(folders["deberta"], settings)
    responses = decode("BESTN", prompts, settings)
    best = pick_best(responses, 6, reward_model, plain.tokenizer, TEMPLATE, reserved=11)
    assert [response.prompt for response in best] == prompts
    for group, winner in enumerate(best):
        samples = responses[group * 6 : group * 6 + 6]
        assert len({tuple(sample.ids) for sample in samples}) > 3
        rewards = [plain.reward(winner.prompt, sample.ids) for sample in samples]
        assert rewards[samples.index(winner)] == pytest.approx(max(rewards), abs=1e-5)


def test_read_out_is_by_length_where_pad_is_eos(folders, reference):
    """A batch of responses that end in EOS, padded with EOS: the reward is the one read at the EOS."""
    reward_model = load(folders, "gpt2-reward")
    eos = reward_model.tokenizer.eos_token_id
    assert reward_model.tokenizer.pad_token_id in (None, eos)
    prompts, responses = [[5, 6, 7]] * 3, [[8, 9, eos], [8, eos], [8, 9]]
    rewards = score_pairs(reward_model, prompts, responses, reserved=4).tolist()
    plain = reference("gpt2", "gpt2-reward")
    expected = [plain.reward_of_ids(prompts[at] + responses[at]) for at in range(3)]
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert len({round(reward, 3) for reward in rewards}) == 3


def test_running_out_of_memory_halves_the_micro_batch(folders, monkeypatch, capsys):
    """No GPU here: reading more than two sequences at once is made to fail as it does there."""
    reward_model = load(folders, "bert")
    pairs = [[5, 6, 7]] * 9, [[8 + at, 9] for at in range(9)]
    expected = score_pairs(reward_model, *pairs, reserved=4)
    whole, most = scoring.token_rewards, 2

    def read_few(reward_model, inputs, segments):
        if len(inputs) > most:
            raise torch.cuda.OutOfMemoryError
        return whole(reward_model, inputs, segments)

    monkeypatch.setattr(scoring, "token_rewards", read_few)
    torch.testing.assert_close(score_pairs(reward_model, *pairs, reserved=4), expected, rtol=0, atol=1e-5)
    most = 0
    with pytest.raises(SystemExit):
        score_pairs(reward_model, *pairs, reserved=4)
    assert "runs out of memory" in capsys.readouterr().err


def test_micro_batches_hold_little_padding():
    assert micro_batch_size([100] * 50, token_budget=1000) == 10
    assert micro_batch_size([100] * 4, token_budget=1000) == 4
    assert micro_batch_size([100, 100, 95, 89, 89], token_budget=1000) == 3
    # A batch below an eighth of the budget is not worth a pass of its own.
    assert micro_batch_size([100, 50, 50, 50], token_budget=1600) == 2
    assert micro_batch_size([5000, 50], token_budget=1000) == 1


def test_references_and_own_responses_are_encoded_alike(folders, prompts):
    """For a causal reward model, text given and the same text written by the policy score the same."""
    policy, reward_model, _ = guided_policy(make_settings(folders, "gpt2", "gpt2-reward"))
    text = " my sister sold my bike"
    response = Response(prompts[0], [], 0, ids=policy.tokenizer(text)["input_ids"])
    (own,) = finished_responses([response], reward_model, policy.tokenizer)
    assert own.ids is not None
    continuations = [own, Continuation(text, finished=True)]
    own, given = score_finished(reward_model, [prompts[0]] * 2, continuations, TEMPLATE, 11, "own")
    assert own == given


def test_long_prompts_lose_their_beginning_and_keep_room(folders, capsys):
    reward_model = load(folders, "bert")
    long = list(range(5, 305))
    room = 256 - reward_model.frame.num_special
    for pair, fitted in (
        ((long, [1, 2, 3]), (long[-(room - 11) :], [1, 2, 3])),
        ((long, long[:40]), (long[-(room - 40) :], long[:40])),
        ((long[:20], [1, 2, 3]), (long[:20], [1, 2, 3])),
        ((long, long), ([], long[:room])),
    ):
        assert fit_pair(reward_model, *pair, reserved=11) == fitted
    causal = load(folders, "gpt2-reward")
    eos = [causal.tokenizer.eos_token_id]
    assert fit_pair(causal, long, long + eos, reserved=11) == ([], long[:255] + eos)

    post = "POST: " + "my sister sold my bike and " * 60 + "\nTL;DR:"
    (response,) = decode("ARGS", [post], make_settings(folders, "gpt2", "bert", max_new_tokens=3))
    assert len(response.prompt_ids) == 256 - 3 and len(response.ids) == 3
    with pytest.raises(SystemExit):
        guided_policy(make_settings(folders, "gpt2", "bert", max_new_tokens=253))
    assert "no prompt fits beside --max_new_tokens" in capsys.readouterr().err


# What a run says of its methods


def test_trace_holds_every_step(folders, prompts):
    settings = make_settings(folders, "gpt2", "deberta", trace=True)
    tokenizer = AutoTokenizer.from_pretrained(folders["gpt2"])
    for response in decode("PARGS", prompts[:2], settings):
        assert len(response.steps) == len(response.ids) + (response.finish_reason == "eos")
        for step, token in zip(response.steps, response.ids, strict=False):
            assert step["tokens"][step["chosen"]] == tokenizer.decode([token])
            assert len(step["tokens"]) == len(step["log_probs"]) == len(step["rewards"]) == settings.k
            assert step["log_probs"] == sorted(step["log_probs"], reverse=True)


def test_methods_are_kept_with_what_they_cost(folders, prompts, tmp_path, monkeypatch, call_main):
    """Against a count of the other files: rows, steps of a trace, and the ids of each text."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts", prompts)
    policy, full, partial = (folders[name] for name in ("words", "words-reward", "bert"))
    flags = ["--policy", policy, "--full_reward_model", full, "--partial_reward_model", partial]
    flags += ["--prompts", "prompts", "--k", 8, "--best_of", 4, "--max_new_tokens", 20]
    flags += ["--pargs_weight", 0.1, "--trace"]
    status, output = call_main(PARGS_baselines, *flags, "--methods", "ARGS", "PARGS", "BESTN", "TOP-K")
    assert status == 0, output

    records = read_methods()
    costs = {name: record.cost for name, record in records.items()}
    assert {name: record.method for name, record in records.items()} == {
        "ARGS": Method(policy=policy, guide=full, weight=1.0, greedy=True),
        "PARGS": Method(policy=policy, guide=partial, weight=0.1),
        "BESTN": Method(policy=policy, best_of=4, chooser=full),
        "TOP-K": Method(policy=policy),
    }
    for record in records.values():
        assert (record.k, record.max_new_tokens, record.reference_policy) == (8, 20, policy)
        assert record.evaluator == full
        assert record.cost.seconds > 0 and record.cost.describe() in output
        assert 0.05 < record.cost.peak_gb < 100
    for name in ("ARGS", "PARGS", "TOP-K"):
        rows = read_generations(generation_path(name))
        assert (costs[name].responses, costs[name].tokens) == (7, sum(row.num_tokens for row in rows))
        steps = costs[name].tokens + sum(row.finish_reason == "eos" for row in rows)
        assert (costs[name].steps, costs[name].candidates) == (steps, 8 * steps)
    assert costs["TOP-K"].reward_calls == costs["TOP-K"].reward_tokens == 0

    # A cached guide reads each prompt, then k candidates a step and, but at the first, the token before.
    encode = AutoTokenizer.from_pretrained(policy)
    prompt_ids = {prompt: encode(prompt)["input_ids"] for prompt in prompts}
    steps = sum(len(trace.steps) for trace in read_traces(trace_path("ARGS")))
    assert costs["ARGS"].reward_calls == 8 * steps
    assert costs["ARGS"].reward_tokens == sum(map(len, prompt_ids.values())) + 9 * steps - len(prompts)

    # Another one reads every text with its prompt; an EOS, which ends some responses, adds no text.
    traces = read_traces(trace_path("PARGS"))
    steps, read, pair = sum(len(trace.steps) for trace in traces), 0, AutoTokenizer.from_pretrained(partial)
    for trace in traces:
        prefix = []
        for step in trace.steps:
            continued = [prefix + encode.convert_tokens_to_ids([token]) for token in step.tokens]
            texts = [encode.decode(ids, skip_special_tokens=True) for ids in continued]
            read += sum(map(len, pair([trace.prompt] * 8, texts)["input_ids"]))
            prefix = continued[step.chosen]
    assert steps > costs["PARGS"].tokens
    assert (costs["PARGS"].reward_calls, costs["PARGS"].reward_tokens) == (8 * steps, read)

    # The chooser reads all samples, each with an EOS.
    samples = decode(
        "BESTN", prompts, make_settings(folders, "words", "words-reward", k=8, max_new_tokens=20)
    )
    tokens = sum(len(sample.ids) for sample in samples)
    assert (costs["BESTN"].responses, costs["BESTN"].tokens) == (4 * 7, tokens)
    read = sum(len(prompt_ids[sample.prompt]) + len(sample.ids) + 1 for sample in samples)
    assert (costs["BESTN"].reward_calls, costs["BESTN"].reward_tokens) == (4 * 7, read)


def test_a_cost_in_one_line_and_of_several_processes():
    numbers = {"responses": 2, "tokens": 40, "reward_calls": 420, "reward_tokens": 9000}
    cost = Cost(**numbers, seconds=4, steps=42, candidates=420, peak_gb=1.5)
    assert cost.describe() == (
        "2 responses, 40 tokens in 4.0 s (10 a second); 420 rewards asked for, 9000 tokens read for them; "
        "10.0 candidates a step; peak memory 1.50 GB"
    )
    old = Cost.model_validate(numbers | {"seconds": 2})  # of a file without the later fields
    said = "2 responses, 40 tokens in 2.0 s (20 a second); 420 rewards asked for, 9000 tokens read for them"
    assert old.describe() == said
    both = Cost.together([cost, cost.model_copy(update={"seconds": 5.0, "peak_gb": 0.5}), old])
    assert (both.seconds, both.steps, both.candidates, both.peak_gb) == (5, 84, 840, 1.5)
    assert Cost.together([old, old]).peak_gb is None


def test_a_guide_that_also_chooses_is_counted_once(folders, prompts, monkeypatch):
    settings = make_settings(folders, "words", "words-reward", trace=True)
    method = Method(
        policy=settings.policy,
        guide=settings.full_reward_model,
        weight=1.0,
        best_of=2,
        chooser=settings.full_reward_model,
    )
    monkeypatch.setitem(METHODS, "BESTG", lambda settings: method)
    samples = decode("BESTG", prompts, settings)
    _, _, cost = run_method("BESTG", prompts, TEMPLATE, settings)
    steps = sum(len(sample.steps) for sample in samples)
    assert cost.reward_calls == settings.k * steps + len(samples)
