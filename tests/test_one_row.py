"""A method is one row of METHODS: PARGS on the DPO policy, in every file of stages 4 and 5."""

import json
import re
import shutil

import pandas as pd
import PARGS_baselines
import pytest
import show_generations
import show_result
from conftest import make_posts, write_prompts

from pargs.runs import Method, read_generations, read_methods


@pytest.mark.slow
def test_a_method_is_one_row(small_models, tmp_path, monkeypatch, call_main):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        PARGS_baselines.METHODS,
        "PARGS-DPO",
        lambda s: Method(policy=s.dpo_policy, guide=s.partial_reward_model, weight=s.pargs_weight),
    )
    shutil.copytree(small_models["llama"], "GPT2_large_tldr_DPO")  # its tokenizer is the other policy's
    prompts = [f"POST: {post}\nTL;DR:" for post, *_ in make_posts(5, 4)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    models = ["--policy", small_models["gpt2"], "--full_reward_model", small_models["deberta"]]
    models += ["--partial_reward_model", small_models["gpt2-reward"]]
    flags = ["--prompts", "prompts.jsonl", "--k", 5, "--max_new_tokens", 8, "--trace"]
    status, output = call_main(PARGS_baselines, *models, *flags, "--methods", "ARGS", "TOP-K", "PARGS-DPO")
    assert status == 0, output
    assert [row.prompt for row in read_generations(tmp_path / "generation_pargs_dpo.json")] == prompts
    guided = Method(policy="GPT2_large_tldr_DPO", guide=small_models["gpt2-reward"], weight=2.0)
    assert read_methods()["PARGS-DPO"].method == guided
    rewards = pd.read_csv("baseline_results.csv")
    assert list(rewards) == ["prompt", "ARGS", "TOP-K", "PARGS-DPO", "reference"]

    figures = []
    monkeypatch.setattr(show_result, "save_figure", lambda figure, path: figures.append(figure))
    status, output = call_main(show_result, "--policy", small_models["gpt2"])
    assert status == 0, output
    cells = [re.split(r" *\| *", line) for line in (tmp_path / "average_reward.md").read_text().splitlines()]
    (shown,) = [dict(zip(cells[0], line, strict=True)) for line in cells if "PARGS-DPO" in line]
    assert shown["Reward"].startswith(f"{rewards['PARGS-DPO'].mean():.3f} ± ")
    summary = pd.read_csv("average_reward.csv", index_col="method")
    assert float(shown["KL"]) == pytest.approx(summary["sampled_kl"]["PARGS-DPO"], abs=0.05)
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert "PARGS-DPO  (n=5)" in labels

    status, output = call_main(show_generations)
    assert status == 0, output
    page = (tmp_path / "generations.html").read_text()
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert "PARGS-DPO" in data["methods"] and len(data["traces"]["PARGS-DPO"]) == 5
    assert "PARGS-DPO" in [line[0] for line in data["table"]["rows"]]
    at = data["methods"].index("PARGS-DPO")
    written = read_generations(tmp_path / "generation_pargs_dpo.json")
    assert [prompt["responses"][at] for prompt in data["prompts"]] == [each.result for each in written]
