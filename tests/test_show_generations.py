"""The page of generations: its data safe in the markup, and what a browser shows of it."""

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import show_generations
import show_result
from small_runs import (
    CSV,
    read_page,
    refuse,
    run_script,
    trace_step,
    write_generations,
    write_records,
    write_references,
    write_trace,
)

from pargs.runs import Method

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)

ATTACK = (
    "<script>window.attacked = 1</script></script><script>window.attacked = 2</script>"
    "<img src=x onerror='window.attacked = 3'><!--<script> \u2028\u2029 &lt;b&gt; ]]> \"quoted\" "
    "@SCRIPT@ @DATA@"
)
METHODS = ["ARGS", "PARGS-G", "PARGS", "TOP-K"]
NUM_PROMPTS = 100
ATTACKED = 7  # the prompt whose texts attack the page
MISSING = 11  # the prompt that PARGS has no reward for


def write_run(directory: Path) -> pd.DataFrame:
    """100 prompts, one of them an attack, a trace of ARGS, one reward missing; returns the rewards."""
    rng = np.random.default_rng(5)
    prompts = [f"POST: post number {at} about topic{at % 10}.\nTL;DR:" for at in range(NUM_PROMPTS)]
    prompts[ATTACKED] = f"POST: {ATTACK}\nTL;DR:"
    rewards = pd.DataFrame(rng.normal(size=(NUM_PROMPTS, 5)), columns=[*METHODS, "reference"])
    rewards.loc[MISSING, "PARGS"] = np.nan
    rewards.assign(prompt=prompts).to_csv(directory / CSV, index=False)

    def texts(label: str) -> list[str]:
        return [f" {ATTACK}" if at == ATTACKED else f" {label} {at}" for at in range(NUM_PROMPTS)]

    reasons = ["length", *["eos"] * (NUM_PROMPTS - 1)]
    for method in METHODS:
        write_generations(
            directory, method, texts(f"{method} on"), prompts, num_tokens=3, finish_reason=reasons
        )
    write_references(directory, texts("reference"), prompts)

    steps = [
        [
            trace_step(
                (" no", -0.25, 1.5), (f" {ATTACK if at == ATTACKED else 'ARGS'}", -1.5, 2.75), chosen=1
            ),
            trace_step((f" on {at}", -0.125, 0.5), ("\n", -3.0, None), chosen=0),
            trace_step(("<|endoftext|>", -0.5, 0.25), ("!", -4.0, -0.75), chosen=0),
        ]
        for at in range(NUM_PROMPTS)
    ]
    write_trace(directory, "ARGS", steps, prompts)
    write_records(directory, "p", ARGS=Method(policy="p", guide="r", weight=2))
    return rewards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    rewards = write_run(directory)
    run_script(show_result, directory)
    run_script(show_generations, directory)
    return directory, rewards


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --window-size=1366,900 --user-data-dir={profile}"
    ).split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(run, browser):
    browser.get((run[0] / "generations.html").as_uri())
    return browser


def shown(page) -> list[int]:
    """The prompts on the page, from top to bottom."""
    cards = "[...document.querySelectorAll('article')].filter((card) => card.getClientRects().length)"
    return page.execute_script(f"return {cards}.map((card) => Number(card.dataset.prompt))")


def choose(page, menu: str, option: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", menu)).select_by_visible_text(option)


def point_at(page, element) -> None:
    """Scroll to an element, wait for the scrolling to be over (it closes what is open), and point at it."""
    from selenium.webdriver import ActionChains

    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
    ActionChains(page).move_to_element(element).perform()


class TagCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))


def test_data_cannot_become_markup(run):
    page = (run[0] / "generations.html").read_text(encoding="utf-8")
    (embedded,) = re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(embedded)

    data = read_page(run[0])
    assert data["rules"] == {"ARGS": {"weight": 2, "greedy": False}}
    assert data["prompts"][ATTACKED]["prompt"] == f"POST: {ATTACK}\nTL;DR:"
    assert data["prompts"][ATTACKED]["responses"] == [f" {ATTACK}"] * 5
    assert data["prompts"][MISSING]["rewards"][2] is None

    parser = TagCollector()
    parser.feed(page)
    scripts = [attributes for tag, attributes in parser.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    # Self-contained: no attribute asks for anything, and nothing would be fetched.
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in parser.tags)
    assert not [
        attributes for _, attributes in parser.tags if {"src", "href", "action", "data"} & set(attributes)
    ]


@pytest.mark.slow
@needs_chromium
def test_renders_every_prompt_and_summary(page, run):
    _, rewards = run
    assert shown(page) == list(range(NUM_PROMPTS))
    assert page.find_element("id", "count").text == "100 of 100 prompts"
    for at in (0, 42, 99):
        card = page.find_element("css selector", f"article[data-prompt='{at}']")
        assert (
            card.find_element("css selector", ".post")
            .get_property("textContent")
            .startswith(f"POST: post number {at} about")
        )
        for method in [*METHODS, "reference"]:
            response = card.find_element("css selector", f"[data-method='{method}']")
            expected = f"reference {at}" if method == "reference" else f"{method} on {at}"
            text = response.find_element("css selector", ".text").get_property("textContent")
            assert text.removesuffix("<|endoftext|>") == expected
            reward = response.find_element("css selector", ".reward").get_property("textContent")
            assert reward == f"{rewards.loc[at, method]:.3f}"

        best = card.find_elements("css selector", ".best")
        assert [each.get_dom_attribute("data-method") for each in best] == [rewards.loc[at, METHODS].idxmax()]
    missing = page.find_element(
        "css selector", f"article[data-prompt='{MISSING}'] [data-method='PARGS'] .reward"
    )
    assert missing.get_property("textContent") == "–"
    footnotes = page.find_elements("css selector", "[data-prompt='0'] [data-method='TOP-K'] .footnote")
    assert [note.get_property("textContent") for note in footnotes] == ["3 tokens, cut off at the limit"]
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@needs_chromium
def test_opens_on_the_summaries_with_table_notes_and_figure_folded_below(page, run):
    directory, _ = run
    overview = page.find_element("id", "overview")
    first = page.find_element("css selector", "article[data-prompt='0'] .response")
    assert first.location["y"] < 300 and overview.get_property("open") is False
    assert not page.find_element("id", "results").is_displayed()
    legend = page.find_element("id", "legend").text
    assert "framed the method with the highest reward for this post" in legend and "point at one" in legend

    page.find_element("id", "show-results").click()
    rows = page.find_elements("css selector", "#results tr")
    table = pd.read_csv(directory / "average_reward.csv", index_col="method")
    assert [row.text.split()[0] for row in rows] == ["Method", *METHODS, "reference"]
    assert f"{table.loc['ARGS', 'mean']:.3f} ± {table.loc['ARGS', 'standard_error']:.3f}" in rows[1].text
    assert "PARGS has no reward in 1 of 100 rows (row 12)" in page.find_element("id", "notes").text
    assert rows[0].is_displayed() and overview.location["y"] > first.location["y"]
    image = page.find_element("css selector", "#figures img")
    assert image.get_property("naturalWidth") > 500 and image.get_property("alt") == "average_reward"


@pytest.mark.slow
@needs_chromium
def test_sorts_by_reward_and_by_gap(page, run):
    _, rewards = run
    known = rewards.drop(index=MISSING)
    choose(page, "sort", "reward of PARGS")
    best_first = list(known["PARGS"].sort_values(ascending=False).index)
    assert shown(page) == [*best_first, MISSING]

    page.find_element("id", "direction").click()
    assert shown(page) == [*best_first[::-1], MISSING]  # what has no reward stays last

    page.find_element("id", "direction").click()
    choose(page, "minus", "TOP-K")
    gap = (known["PARGS"] - known["TOP-K"]).sort_values(ascending=False)
    assert shown(page) == [*gap.index, MISSING]
    first = page.find_element("css selector", "article .post-head span").get_property("textContent")
    assert first == f"gap {gap.iloc[0]:.3f}"

    choose(page, "sort", "prompt order")
    assert shown(page) == list(range(NUM_PROMPTS))


@pytest.mark.slow
@needs_chromium
def test_searches_posts_and_summaries(page):
    search = page.find_element("id", "search")
    search.send_keys("TOPIC3 post")
    assert shown(page) == list(range(3, NUM_PROMPTS, 10))
    assert page.find_element("id", "count").text == "10 of 100 prompts"
    search.clear()
    search.send_keys("reference 42")
    assert shown(page) == [42]
    search.clear()
    search.send_keys("no such words")
    assert shown(page) == []


@pytest.mark.slow
@needs_chromium
def test_hides_a_method(page):
    button = page.find_element("xpath", "//span[@id='methods']/button[text()='TOP-K']")

    def visible() -> list[str]:
        cards = page.find_elements("css selector", "article[data-prompt='0'] .response")
        return [card.get_dom_attribute("data-method") for card in cards if card.is_displayed()]

    button.click()
    assert visible() == ["ARGS", "PARGS-G", "PARGS", "reference"]
    button.click()
    assert visible() == [*METHODS, "reference"]


@pytest.mark.slow
@needs_chromium
def test_shows_the_candidates_of_a_token(page):
    tokens = page.find_elements("css selector", "article[data-prompt='2'] [data-method='ARGS'] .token")
    assert [token.get_property("textContent") for token in tokens] == ["ARGS", " on 2", "<|endoftext|>"]
    assert not page.find_elements("css selector", "[data-method='PARGS'] .token")  # it has no trace

    point_at(page, tokens[1])
    box = page.find_element("id", "candidates")

    def cells() -> list[list[str]]:
        rows = box.find_elements("tag name", "tr")
        return [[cell.text for cell in row.find_elements("xpath", "*")] for row in rows]

    names = ["candidate", "log p", "reward r", "log p + 2 r", "probability"]
    assert cells() == [names, ["␣on␣2", "-0.13", "0.50", "0.88", "–"], ["↵", "-3.00", "–", "–", "–"]]
    assert [row.text.split()[0] for row in box.find_elements("css selector", ".chosen")] == ["␣on␣2"]

    point_at(page, tokens[0])  # scores of 2.75 and 4
    share = 1 / (1 + math.exp(4 - 2.75))
    shares = [row[4] for row in cells()[1:]]
    assert shares == [f"{share:.1%}", f"{1 - share:.1%}"]
    assert [row[3] for row in cells()[1:]] == ["2.75", "4.00"]
    assert "ARGS, sampled from the softmax of the scores" in box.text

    page.execute_script("data.rules.ARGS.greedy = true")
    point_at(page, tokens[2])
    assert [row[4] for row in cells()[1:]] == ["100.0%", "0.0%"] and "greedy" in box.text
    page.execute_script("data.rules = {}")  # an older run's, without methods.json
    point_at(page, tokens[0])
    assert [len(row) for row in cells()] == [3, 3, 3]

    for other in ("#count", "#legend .token"):
        point_at(page, tokens[0])
        assert box.is_displayed()
        point_at(page, page.find_element("css selector", other))
        assert not box.is_displayed()
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@needs_chromium
def test_no_script_of_a_post_runs(page):
    card = page.find_element("css selector", f"article[data-prompt='{ATTACKED}']")
    point_at(page, card.find_element("css selector", ".token"))
    candidates = page.find_element("id", "candidates").get_property("textContent")
    assert "<script>window.attacked" in candidates.replace("␣", " ")

    assert card.find_element("css selector", ".post").get_property("textContent") == f"POST: {ATTACK}\nTL;DR:"
    for text in card.find_elements("css selector", ".text"):
        assert text.get_property("textContent").removesuffix("<|endoftext|>") in (
            ATTACK,
            f"{ATTACK} on {ATTACKED}",
        )
    assert page.execute_script("return window.attacked") is None
    assert page.execute_script("return document.scripts.length") == 2
    assert page.execute_script("return document.querySelectorAll('article img, article script').length") == 0


@pytest.mark.slow
@needs_chromium
def test_the_page_fetches_nothing(page):
    """Even if markup got in, it could not send anything anywhere."""
    page.execute_script("""
        const image = "<img src='http://127.0.0.1:9/x'>";
        document.body.insertAdjacentHTML("beforeend", image);
    """)
    page.execute_async_script("setTimeout(arguments[0], 200)")
    messages = [entry["message"] for entry in page.get_log("browser")]
    assert any("http://127.0.0.1:9/x" in each and "Content Security Policy" in each for each in messages)


def test_a_run_with_less_in_it(tmp_path, capsys):
    """No references, no table, no trace, and a method with no generation file: named, and no error."""
    (tmp_path / CSV).write_text("prompt,PARGS,DPO\na,1,2\nb,,1\n")
    write_generations(tmp_path, "PARGS", [" text"], ["b"])
    run_script(show_generations, tmp_path)

    data = read_page(tmp_path)
    assert data["methods"] == ["PARGS", "DPO", "reference"]
    assert data["table"] is None and data["figures"] == [] and data["traces"] == {}
    assert [prompt["responses"] for prompt in data["prompts"]] == [[None, None, None], [" text", None, None]]
    assert [prompt["rewards"] for prompt in data["prompts"]] == [[1, 2, None], [None, 1, None]]
    printed = capsys.readouterr().out
    for note in (
        "DPO has no generation_dpo.json",
        "no references",
        "no result table",
        "no response for 1 of 2",
    ):
        assert note in printed and any(note in each for each in data["notes"])


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "baseline_results.csv is missing; make it with `python PARGS_decode/PARGS_baselines.py`"),
        ({CSV: "prompt,ARGS\na,1\n"}, ["a", "b"], "a page shows one run, not 2"),
        (
            {CSV: "prompt,ARGS\na,1\n", "average_reward.csv": "nothing\n"},
            [],
            "cannot read average_reward.csv",
        ),
        (
            {CSV: "prompt,ARGS\na,1\n", "average_reward.csv": "method,n\nARGS,1\n"},
            [],
            "is no table of results",
        ),
        (
            {
                CSV: "prompt,ARGS\na,1\n",
                "average_reward.csv": "method,baseline,n,runs,mean\nARGS,ARGS,x,1,2\n",
            },
            [],
            "cannot read average_reward.csv",
        ),
    ],
)
def test_clear_errors(tmp_path, capsys, files, arguments, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    said = refuse(show_generations, tmp_path, capsys, *arguments)
    assert message in said and said.count("\n") == 1


def test_what_is_no_picture_is_left_out(tmp_path):
    (tmp_path / CSV).write_text("prompt,ARGS\na,1\n")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    run_script(show_generations, tmp_path)
    assert read_page(tmp_path)["figures"] == []
