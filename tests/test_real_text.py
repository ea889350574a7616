"""The study on real text: pairs of one prompt in one sequence, trained and read as each would be alone."""

import json
from pathlib import Path

import pytest
import real_figures
import real_models
import real_text
import torch
from arms import read_as
from conftest import hub_rows, hub_test_rows, save, write_hub_data
from datasets import load_from_disk
from real_models import Question
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pargs.cli import SettingsParser
from pargs.models import RewardModel, load_reward_model
from pargs.scoring import score_pairs

END = 3
QUESTIONS = [
    Question([40, 41, 42, 43], [[50, 51, 52, END], [50, 60, END], [61, 62, 63, 64, 65, END]]),
    Question([44, 45], [[52, END], [53, 54, 55, END]]),
]


@pytest.fixture(scope="module")
def start(tokenizers, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = tokenizers["bpe"]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    special = {"pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape, **special)
    return Path(save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("real") / "start"))


@pytest.fixture(scope="module")
def reward_model(start: Path, tmp_path_factory) -> RewardModel:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(start, num_labels=1)
    folder = tmp_path_factory.mktemp("real") / "reward"
    model.save_pretrained(folder)
    real_models.AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return load_reward_model(str(folder), torch.float32, "cpu", 4000)


def alone(reward_model: RewardModel, question: Question, prefixes: list[list[int]]) -> torch.Tensor:
    return score_pairs(reward_model, [question.prompt_ids] * len(prefixes), prefixes, 0)


@pytest.mark.parametrize("reading", ["finished", "always"])
def test_one_pass_reads_what_each_prefix_alone_is_given(reward_model: RewardModel, reading: str) -> None:
    eos = reward_model.tokenizer.eos_token_id
    for question in QUESTIONS:
        responses = [[*response[:-1], eos] for response in question.responses]
        own = Question(question.prompt_ids, responses)
        lengths = [list(range(1, 8))] * len(responses)  # behind a response's end, too
        found = real_models.prefix_rewards(reward_model, own, lengths)[reading]
        for response, rewards in zip(responses, found, strict=True):
            prefixes = [read_as(reward_model, response[:length], reading) for length in range(1, 8)]
            torch.testing.assert_close(
                torch.tensor(rewards), alone(reward_model, own, prefixes), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_has_the_loss_of_its_pairs_alone(reward_model: RewardModel, whole: bool) -> None:
    embed = reward_model.model.get_input_embeddings()
    hidden = {str(at): embed(torch.tensor(each.lay_out()[0])).detach() for at, each in enumerate(QUESTIONS)}
    examples = [{"at": str(at), "question": each} for at, each in enumerate(QUESTIONS)]
    batch = real_models.TopCollator(hidden, whole)(examples)
    losses = []
    for question in QUESTIONS:
        chosen, *others = question.responses
        for other in others:
            longest = max(len(chosen), len(other))
            sides = [
                alone(
                    reward_model,
                    question,
                    [side[:length] for length in range(longest if whole else 1, longest + 1)],
                )
                for side in (chosen, other)
            ]
            losses.append(-torch.nn.functional.logsigmoid(sides[0] - sides[1]))
    trainer: type = real_models.TopTrainer
    loss = trainer.compute_loss(None, reward_model.model, batch)
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


@pytest.fixture(scope="module")
def posts(start: Path, tmp_path_factory) -> Path:
    """Pairs of relevance, encoded, in a small world under the study's folders."""
    data = tmp_path_factory.mktemp("real") / "data"
    data.mkdir()
    rows = hub_rows(24, 1)
    for row in rows:
        row["summaries"][row["choice"]]["policy"] = "ref"
    write_hub_data(data, rows[:20], rows[20:], hub_test_rows(12, 2))
    sources = [
        str(data / name) for name in (real_text.Settings().comparisons, real_text.Settings().test_posts)
    ]
    patch = pytest.MonkeyPatch()
    patch.setattr(real_text, "NUM_POSTS", {"test": 4, "validation": 8, "train": 12, "evaluator": 8})
    real_text.make_judged(*sources, data / "judged")
    real_text.make_relevance(sources[0], data / "judged", data / "relevance")
    real_text.encode(data / "relevance", str(start), data / "relevance-encoded")
    patch.undo()
    return data


@pytest.mark.slow
def test_posts_are_in_one_part_alone(posts: Path) -> None:
    relevance, evaluator = (load_from_disk(str(posts / name)) for name in ("relevance", "evaluator"))
    parts = [set(relevance[split]["prompt"]) for split in ("train", "validation", "test")]
    parts.append(set(evaluator["train"]["prompt"]))
    assert [len(part) for part in parts] == [12, 8, 4, 8]
    assert len(set.union(*parts)) == 32

    own = dict(zip(relevance["train"]["prompt"], relevance["train"]["chosen"], strict=True))
    for row in relevance["train"]:
        assert row["chosen"] == own[row["prompt"]]
        assert row["rejected"] in set(own.values()) - {row["chosen"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "partial"])
def test_only_the_top_layers_are_trained(
    start: Path, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(real_models, "NUM_FROZEN", 2)
    frozen, output = tmp_path / "frozen.safetensors", tmp_path / f"relevance-{kind}-s1"
    real_models.freeze(posts / "relevance-encoded", start, frozen)
    arguments = (posts / "relevance-encoded", frozen, start, kind, 2, 1e-3, 1, output)
    real_models.train_top(*arguments)

    before = LlamaForSequenceClassification.from_pretrained(start, num_labels=1).state_dict()
    after = LlamaForSequenceClassification.from_pretrained(output).state_dict()
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    layers = {name.split(".")[2] for name in changed if "layers" in name}
    assert layers == {"2", "3"} and "model.embed_tokens.weight" not in changed

    results = tmp_path / "results"
    real_text.rank(output, posts / "relevance-encoded", results / "ranked.json")
    found = json.loads((results / "ranked.json").read_text())
    assert len(found["prompts"]) == len(found["right"]["finished"]) == len(found["right"]["always"])
    assert sorted(set(found["prompts"])) == list(range(len(set(found["prompts"]))))


def test_tasks_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """And without relevance, which alone decodes posts, there is nothing to decode."""
    settings = SettingsParser(real_text.Settings, None).parse_args_into_dataclasses(
        ["--tasks", "hh", "judged"]
    )[0]
    outputs = {piece.output.name for piece in real_text.plan(settings)}
    assert settings.tasks == ["hh", "judged"] and "hh-full-s1" in outputs and "judged-partial-s3" in outputs
    assert not [name for name in outputs if name in ("policy", "evaluator") or "unguided" in name]

    monkeypatch.setattr("sys.argv", ["real_text.py", "--tasks", "hhh"])
    with pytest.raises(SystemExit):
        real_text.main()
    assert "error: --tasks knows relevance, judged, hh, not hhh" in capsys.readouterr().err


def test_a_row_of_the_table_is_of_prompts(tmp_path: Path) -> None:
    """Pairs of one prompt are one case: the interval is over prompts, the tests over pairs of a seed."""
    right = [[True], [False], [None], [True]]
    for kind, own in (("full", [[False], [False], [True], [True]]), ("partial", right)):
        found = {"percentages": [50], "prompts": [0, 0, 1, 2], "right": {"finished": own, "always": right}}
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"relevance-{kind}-s1.json").write_text(json.dumps(found))
    accuracy, paired = real_figures.rank_tables(tmp_path)
    of = accuracy.set_index("label")
    assert of.loc["partial", "right"] == pytest.approx(0.75) and of.loc["partial", "prompts"] == 2
    assert of.loc["full open", "right"] == pytest.approx(2 / 3) and of.loc["full open", "pairs"] == 4
    gain = paired.set_index("second").loc["full open"]
    assert gain["difference"] == pytest.approx(0.25) and gain["p_seed_1"] == 1.0

    real_figures.report(tmp_path, tmp_path / "docs")
    assert {path.name for path in (tmp_path / "docs").glob("*.[cp][sn][vg]")} == {
        "real_accuracy.csv",
        "real_accuracy_paired.csv",
        "real_ranking.png",
    }
