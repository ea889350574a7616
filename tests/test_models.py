"""Models and tokenizers as they come: lacking weights, long inputs, precision, SentencePiece."""

import json
from pathlib import Path

import PARGS_baselines
import pytest
import torch
from conftest import assert_one_error, make_posts, save, write_prompts
from final_rewards import score_responses
from guides import CachedGuide, RereadingGuide, choose_guide
from PARGS_baselines import run_method
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from reference import Reference
from responses import Response, begin_responses
from run_models import get_evaluator, get_policy, get_reward_model
from safetensors.torch import load_file, save_file
from test_decoding import TEMPLATE, decode, make_settings
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pargs.encoding import decode_texts, encode_texts
from pargs.models import load_policy, load_reward_model, longest_input, warn_of_unused_separator
from pargs.runs import REWARDS, Method, read_rewards
from pargs.scoring import fit_pair

CPU = torch.device("cpu")


# Weights


def test_an_adapter_whose_base_has_moved_ends_in_one_message(small_models, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(small_models["gpt2"])
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_models["gpt2"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    moved = config | {"base_model_name_or_path": str(tmp_path / "moved")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(SystemExit) as stopped:
        load_policy(str(tmp_path), torch.float32, CPU)
    assert_one_error(stopped.value.code, capsys.readouterr().err, "cannot load the policy", "moved")


def test_a_tokenizer_with_more_ids_than_the_reward_model_keeps_its_cache(small_models, prompts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2"])
    tokenizer.add_tokens([f"<extra{at}>" for at in range(500)])
    reward_model = AutoModelForSequenceClassification.from_pretrained(small_models["gpt2-reward"])
    policy = AutoModelForCausalLM.from_pretrained(small_models["gpt2"])
    settings = make_settings(
        {
            "policy": save(policy, tokenizer, tmp_path / "policy"),
            "reward": save(reward_model, tokenizer, tmp_path / "reward"),
        },
        "policy",
        "reward",
    )
    own = get_policy(settings.policy, settings)
    responses = begin_responses(own, prompts, TEMPLATE, 1, 8, "ARGS")
    guide = get_reward_model(settings.partial_reward_model, settings)
    assert isinstance(choose_guide(guide, own, TEMPLATE, 8, 5, responses), CachedGuide)


@pytest.mark.parametrize("parts", [{"best_of": 3}, {"weight": 1.0}])
def test_a_method_has_all_its_parts(parts):
    with pytest.raises(ValidationError, match="best_of needs a chooser, and weight a guide"):
        Method(policy="base", **parts)


@pytest.fixture
def change_weights(small_models, tmp_path):
    """`change_weights(change)`: the small GPT-2 with what `change` makes of its weights."""

    def change_and_save(change) -> str:
        folder = Path(small_models["gpt2"])
        save(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), tmp_path)
        path = tmp_path / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return str(tmp_path)

    return change_and_save


LACKING = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        (lambda weights: {name: weight for name, weight in weights.items() if name != LACKING}, LACKING),
        (lambda weights: {f"pretrained_model.{name}": weight for name, weight in weights.items()}, "lm_head"),
    ],
    ids=["one-is-missing", "trl-prefix"],
)
def test_a_policy_that_lacks_weights_is_refused(change_weights, change, lacking, capsys):
    folder = change_weights(change)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        get_policy(folder, make_settings({"new": folder}, "new", "new"))
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2
    assert line.startswith(f"error: {folder!r} is no whole policy: it has no weights for {lacking}")


def test_a_value_head_is_left_out_with_a_warning(change_weights, small_models, prompts, capsys):
    def add_value_head(weights):
        return weights | {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}

    folders = small_models | {"with-head": change_weights(add_value_head)}
    expected = decode("TOP-K", prompts, make_settings(folders, "gpt2", "bert"))
    capsys.readouterr()
    assert decode("TOP-K", prompts, make_settings(folders, "with-head", "bert")) == expected
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("warning:")
    assert line.endswith("weights that no language model uses: v_head.summary.bias, v_head.summary.weight")


# What a reward model can read, and in which precision


def test_roberta_reads_the_positions_it_gives_to_tokens(small_models, tokenizers, tmp_path):
    """Its first two positions, up to the id of the padding, are never used."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["wordpiece"].backend_tokenizer,
        **{f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep")},
        pad_token="[UNK]",  # whose id is 1, as RoBERTa's padding is
        model_input_names=["input_ids", "attention_mask"],
    )
    assert words.model_max_length > 1e20 and words.pad_token_id == 1
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": 514, "vocab_size": len(words), "initializer_range": 0.3}
    config = RobertaConfig(**shape, pad_token_id=1, num_labels=1)
    assert longest_input(config, words) == 512

    folder = save(RobertaForSequenceClassification(config), words, tmp_path)
    long = "POST: " + "my sister sold my bike and " * 120 + "\nTL;DR:"
    settings = make_settings(small_models | {"roberta": folder}, "gpt2", "roberta")
    (generation,), *_ = run_method("TOP-K", [long], TEMPLATE, settings)

    reward_model = load_reward_model(folder, torch.float32, CPU, 1024)
    prompt_ids, response_ids = encode_texts(words, [long, generation.result])
    pair = fit_pair(reward_model, prompt_ids, response_ids, settings.max_new_tokens + 1)
    read = reward_model.frame.ids(*pair)
    assert len(prompt_ids) > 600 and len(read) == 512 - settings.max_new_tokens - 1 + len(response_ids)
    expected = reward_model.model(torch.tensor([read])).logits.item()
    assert generation.reward == pytest.approx(expected, abs=1e-4)


def test_reported_rewards_are_of_full_precision(small_models, prompts, tmp_path, monkeypatch, call_main):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts", prompts)
    policy, reward_name = small_models["gpt2"], small_models["llama-reward"]
    flags = ["--policy", policy, "--full_reward_model", reward_name, "--prompts", "prompts"]
    flags += ["--methods", "TOP-K", "--max_new_tokens", 8, "--dtype", "bfloat16"]
    status, output = call_main(PARGS_baselines, *flags)
    assert status == 0, output

    settings = make_settings(small_models, "gpt2", "llama-reward", dtype="bfloat16")
    assert get_reward_model(reward_name, settings).model.dtype == torch.bfloat16
    assert get_evaluator(reward_name, settings).model.dtype == torch.float32
    plain, rewards = Reference.load(policy, reward_name, causal=True), read_rewards(Path(REWARDS))["TOP-K"]
    responses = decode(
        "TOP-K", prompts, make_settings(small_models, k=10, max_new_tokens=8, dtype="bfloat16")
    )
    ids = [[*plain.tokenizer(each.prompt)["input_ids"], *each.ids, 0] for each in responses]
    assert rewards.tolist() == pytest.approx([plain.reward_of_ids(own) for own in ids], abs=1e-4)

    plain.reward_model.bfloat16()
    assert max(abs(rewards - [plain.reward_of_ids(own) for own in ids])) > 1e-3


# Text that a policy with a SentencePiece tokenizer writes


@pytest.fixture(scope="module")
def sentencepiece(corpus) -> PreTrainedTokenizerFast:
    """Built like Llama 2's: spaces are marked before a word, unknown characters are spelt in bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([*corpus, *["The cat. The dog."] * 300], trainer)
    trained = json.loads(backend.to_str())["model"]
    vocabulary, merges = trained["vocab"], [tuple(pair) for pair in trained["merges"]]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    space = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence(
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", model_max_length=256
    )


TEXTS = [" The cat", " my sister", " my sister lost the keys", " a"]


def as_continued(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of texts as they stand behind a word."""
    (before,) = encode_texts(tokenizer, ["a"])
    return [ids[len(before) :] for ids in encode_texts(tokenizer, ["a" + text for text in texts])]


@pytest.mark.parametrize("name", ["unigram", "sentencepiece"])
def test_decoded_responses_keep_their_leading_space(tokenizers, sentencepiece, name):
    tokenizer = {**tokenizers, "sentencepiece": sentencepiece}[name]
    texts = TEXTS[1:] if name == "unigram" else [*TEXTS, " 猫 Köln", ". The", ""]
    continued = as_continued(tokenizer, texts)
    assert decode_texts(tokenizer, continued) == texts
    dropped = tokenizer.backend_tokenizer.decode_batch(continued)
    assert [text.lstrip() for text in texts] == dropped  # so that there is something to keep


def test_byte_level_text_is_decoded_as_it_is(tokenizers):
    bpe, generator = tokenizers["bpe"], torch.Generator().manual_seed(0)
    sequences = torch.randint(len(bpe), (50, 6), generator=generator).tolist()  # bytes of cut characters, too
    sequences += [*encode_texts(bpe, [*TEXTS, "the", " "]), []]
    assert decode_texts(bpe, sequences) == bpe.backend_tokenizer.decode_batch(sequences)


def test_a_sentencepiece_policy_writes_its_leading_space(small_models, sentencepiece, prompts, tmp_path):
    """Into its results, and for a byte-level reward model of another family, which reads `TL;DR: The`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**shape, "vocab_size": len(sentencepiece), "initializer_range": 0.3, "eos_token_id": 1}
    torch.manual_seed(0)
    folder = save(LlamaForCausalLM(LlamaConfig(**config)), sentencepiece, tmp_path)
    settings = make_settings(
        small_models | {"llama-2": folder}, "llama-2", "gpt2-reward", k=50, max_new_tokens=4
    )
    plain = Reference.load(small_models["gpt2"], small_models["gpt2-reward"], causal=True)
    eos = plain.tokenizer.eos_token_id

    many = [f"POST: {post}\nTL;DR:" for post, _, _ in make_posts(80, 6)]
    generations, *_ = run_method("TOP-K", many, TEMPLATE, settings)
    begins = [sentencepiece.convert_ids_to_tokens(row.ids[0]).startswith("▁") for row in generations]
    assert [row.result.startswith(" ") for row in generations] == begins
    spaced = [row for row in generations if row.result[:1] == " " and row.result[1:2].isalpha()]
    assert len(spaced) > 2
    for row in spaced:
        ids = [*plain.tokenizer(row.prompt + row.result)["input_ids"], eos]
        assert row.reward == pytest.approx(plain.reward_of_ids(ids), abs=2e-4)

    # The same of the text that was asked about, word for word.
    (the,) = as_continued(sentencepiece, [" The"])
    reward_model = get_reward_model(small_models["gpt2-reward"], settings)
    response = Response(prompts[0], [], 0, ids=the[:-1])
    guide = RereadingGuide(reward_model, sentencepiece, {1}, TEMPLATE, reserved=11)
    guide.begin([response])
    asked = guide.score([response], torch.tensor([the[-1:]])).item()
    with_space = plain.reward_of_ids(plain.tokenizer(prompts[0] + " The")["input_ids"])
    without = plain.reward_of_ids(plain.tokenizer(prompts[0] + "The")["input_ids"])
    assert asked == pytest.approx(with_space, abs=1e-4)
    assert abs(with_space - without) > 1e-2

    response.ids = the
    (row,) = score_responses([response], reward_model, sentencepiece, TEMPLATE, 11, None, "TOP-K")
    assert row.result == " The"


# Prompts


def test_a_separator_that_the_template_does_not_use_is_said(tokenizers, sentencepiece, capsys):
    warn_of_unused_separator("policy", tokenizers["bpe"], TEMPLATE)
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("warning: the tokenizer of 'policy' has a '<sep>'") and "model card" in line

    warn_of_unused_separator("policy", tokenizers["bpe"], TEMPLATE + "<sep>")
    warn_of_unused_separator("policy", sentencepiece, TEMPLATE)
    assert capsys.readouterr().err == ""
