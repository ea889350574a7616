"""Write the demo's data: forum posts with two summaries each, and which of the two is preferred.

Writes, under OUT_DIR, the two data sets that stage 1 loads from the hub, in the hub's schema:
  openai/summarize_from_feedback/   comparisons, splits train and validation
  CarperAI/openai_summarize_tldr/   test posts with a reference summary
  demo_facts.json                   the facts of each validation and test post, to judge summaries by
A post's story (who, what, the question) decides its split: no seed or size puts a test story into training.

    python demo/make_posts.py OUT_DIR [--train_pairs 4000] [--seed 0]
"""

import hashlib
import json
import os
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as parquet
import themes as world
from quality import split_words, stem, true_quality
from tqdm import tqdm

from pargs.cli import SettingsParser, run_script

ROLES = sorted({r for theme in world.THEMES.values() for r in theme["people"]} | set(world.BYSTANDERS))
DEFECTS = ("event", "people", "question", "invention", "repetition", "brevity")
LONGEST_SUMMARY = 34  # words
# Chances of each defect, one drawn for each summary: a policy that imitates such writers leaves room above
# its most likely summary. How much is measured on validation posts; docs/claim.md says how they were chosen.
CARELESSNESS = (0.3, 0.6, 0.8)
TIE = 0.01  # two summaries whose totals are closer than this say nothing about what is preferred

COMPARISONS = pa.schema(
    {
        "info": pa.struct(
            {name: pa.string() for name in ("id", "post", "title", "subreddit", "site", "article")}
        ),
        "summaries": pa.list_(pa.struct({name: pa.string() for name in ("text", "policy", "note")})),
        "choice": pa.int32(),
        "worker": pa.string(),
        "batch": pa.string(),
        "split": pa.string(),
        "extra": pa.struct({"confidence": pa.int32()}),
    }
)
TEST_POSTS = pa.schema({"prompt": pa.string(), "label": pa.string()})

CARD = """---
license: mit
configs:
- config_name: {config}
  description: {digest}
  data_files:
{files}---
Forum posts of an invented small world, written by demo/make_posts.py, in the schema of the hub's
{name}. {about}
"""


@dataclass
class Settings:
    train_pairs: int = field(default=4000, metadata={"help": "Comparisons in the training split."})
    validation_pairs: int = field(default=400, metadata={"help": "Comparisons in the validation split."})
    test_posts: int = field(default=200, metadata={"help": "Test posts, each with a reference summary."})
    articles: int = field(default=6, metadata={"help": "News articles among the validation rows: no post."})
    label_noise: float = field(
        default=0.03, metadata={"help": "Share of preferences that are turned around."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random choices."})


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def parse(line: str, slots: dict[str, str]) -> tuple[list[str], list[str]]:
    """Fill in "wording | wording || concept, concept": its wordings and its concepts."""
    wordings, concepts = line.format_map(slots).split("||")
    return [w.strip() for w in wordings.split("|")], [c.strip().lower() for c in concepts.split(",")]


def draw_slots(rng: random.Random) -> dict[str, str]:
    return {name: rng.choice(values) for name, values in world.SLOTS.items()}


def split_of(*story: object) -> str:
    """A twentieth of all possible stories is for test, a twentieth for validation, the rest for training."""
    place = hashlib.sha256(repr(story).encode()).digest()[0] % 20
    return {0: "test", 1: "validation"}.get(place, "train")


def draw_story(rng: random.Random, split: str) -> dict:
    """Who, what and which question: drawn until the story belongs to the split."""
    while True:
        subreddit = rng.choice(list(world.THEMES))
        theme = world.THEMES[subreddit]
        person, event_line = rng.choice(theme["people"]), rng.choice(theme["events"])
        question_line = rng.choice(theme["questions"])

        she = person in world.SHE or (person not in world.HE and rng.random() < 0.5)
        pronouns = ("she", "her", "her") if she else ("he", "him", "his")
        named = dict(zip(("P", "he", "him", "his"), (f"my {person}", *pronouns), strict=True))
        slots = draw_slots(rng) | named
        event, event_concepts = parse(event_line, slots)
        if split_of(subreddit, person, event_concepts, question_line) == split:
            break

    question, question_concepts = parse(question_line, slots)
    return {
        "theme": theme,
        "subreddit": subreddit,
        "person": person,
        "named": named,
        "slots": slots,
        "event_line": event_line,
        "event": event,
        "event_concepts": event_concepts,
        "question_line": question_line,
        "question": question,
        "question_concepts": question_concepts,
        "bystander": rng.choice([b for b in world.BYSTANDERS if b != person and b not in event[0]]),
        "minor": rng.choice(world.MINOR),
    }


def write_post(rng: random.Random, story: dict) -> str:
    """The event and the question, among background, a side event, an opinion, details and feelings."""
    # Slots of the other sentences are drawn apart from the event's: a post holds other things and places too.
    theme, slots = story["theme"], draw_slots(rng) | story["named"]
    age, event, question = rng.randint(18, 60), rng.choice(story["event"]), rng.choice(story["question"])

    author = [f"I am {age}.", f"I ({age}{rng.choice('MF')}) need some advice.", f"I just turned {age}."]
    background = [rng.choice(author)] * (rng.random() < 0.4) + [
        rng.choice(theme["background"]).format_map(slots)
    ]
    opinion = rng.choice(world.OPINIONS).format(other=story["bystander"])
    before, after = [story["minor"][0]], [opinion]
    if rng.random() < 0.3:
        before, after = after, before

    lead = [
        "",
        "",
        "I found out that ",
        "The problem is that ",
        "It turns out that ",
        "What bothers me is that ",
    ]
    happened = sentence(f"{rng.choice(lead)}{slots['P']} {event}")
    lead = [
        "",
        "",
        "So my question is, ",
        "What I would like to know is this: ",
        "Now I wonder, ",
        "Please tell me, ",
    ]
    asked = sentence(f"{rng.choice(lead)}{question}?")

    # Details and feelings, in turn, up to the length drawn: 50 to 90 tokens of the demo's tokenizers.
    length = rng.randint(52, 70)
    details = rng.sample(theme["details"], len(theme["details"]))
    feelings = rng.sample(world.FEELINGS, len(details))
    for extra in (s.format_map(slots) for pair in zip(details, feelings, strict=True) for s in pair):
        so_far = " ".join([*background, *before, happened, *after, asked])
        if len(re.findall(r"\w+|[^\w\s]", so_far)) >= length:
            break
        after.insert(rng.randint(0, len(after)), extra)

    body = [*background, *before, happened, *after]
    sentences = [asked, *body] if rng.random() < 0.15 else [*body, asked]
    return "".join(sentence(s) + ("\n\n" if rng.random() < 0.08 else " ") for s in sentences).strip()


def write_summary(rng: random.Random, story: dict, defects: set[str]) -> str:
    """A summary with the defects named, some of DEFECTS."""
    who, what, ask = story["named"]["P"], rng.choice(story["event"]), rng.choice(story["question"])

    if "people" in defects:
        who = rng.choice([f"my {story['bystander']}"] * 2 + [f"my {rng.choice(ROLES)}", "someone"])

    if "event" in defects:
        others = [line for line in story["theme"]["events"] if line != story["event_line"]]
        kind = rng.choice(["vague", "minor", "other", "slip", "slip", "slip"])
        if kind == "vague":
            what = rng.choice(world.VAGUE)
        elif kind == "minor":
            who, what = "I", story["minor"][1]
        else:  # another event of the theme, or this one with other things, places and sums in it
            line = story["event_line"] if kind == "slip" else rng.choice(others)
            what = rng.choice(parse(line, draw_slots(rng) | story["named"])[0])

    clause = f"{who} {what}"
    if "invention" in defects:
        clause += f"{rng.choice([' and', ' and then', ' and also'])} {rng.choice(world.INVENTED)}"
    if "repetition" in defects:
        clause += rng.choice([f". {sentence(clause)[:-1]}", f" and {who} {what}", f", yes, {who} {what}"])

    if "question" in defects:
        others = [line for line in story["theme"]["questions"] if line != story["question_line"]]
        ask = rng.choice(["", "any advice", rng.choice(parse(rng.choice(others), story["slots"])[0])])

    text = sentence(clause)
    if ask:
        joints = [f". {sentence(ask)[:-1]}", f", {ask}", f". I want to know, {ask}", f" and I wonder, {ask}"]
        text = text[:-1] + rng.choice(joints) + "?"
    if "brevity" in defects:
        longer = [
            f"{rng.choice(world.OPENERS)} {text[0].lower()}{text[1:]}",
            f"{text} {rng.choice(world.CLOSERS)}",
        ]
        text = rng.choice(longer).replace(" i ", " I ")

    return text


def facts_of(story: dict, post: str) -> dict:
    """What true_quality needs to know of a post; `words` holds the stems that a summary may use."""
    said = [post, story["subreddit"], *story["event"], *story["question"]]
    return {
        "person": story["person"],
        "roles": ROLES,
        "event": story["event_concepts"],
        "question": story["question_concepts"],
        "words": sorted({stem(word) for text in said for word in split_words(text)}),
    }


def draw_summary(rng: random.Random, story: dict) -> str:
    """A summary of random quality: its writer's carelessness is drawn first, then each defect by itself."""
    carelessness = rng.choice(CARELESSNESS)
    while True:
        text = write_summary(rng, story, {defect for defect in DEFECTS if rng.random() < carelessness})
        if len(split_words(text)) <= LONGEST_SUMMARY:
            return text


def comparison(identity: str, info: dict, texts: list[str], choice: int, split: str, confidence: int) -> dict:
    """A row in the hub's schema; responses carry their leading space there."""
    return {
        "info": dict.fromkeys(("post", "title", "subreddit", "site", "article")) | {"id": identity} | info,
        "summaries": [{"text": f" {text}", "policy": "writer", "note": None} for text in texts],
        "choice": choice,
        "worker": "true_quality",
        "batch": "demo",
        "split": split,
        "extra": {"confidence": confidence},
    }


def draw_title(rng: random.Random, story: dict) -> str:
    person = story["named"]["P"]
    return rng.choice(
        [f"A problem with {person}", f"I need advice about {person}", f"What to do about {person}?"]
    )


def draw_comparison(rng: random.Random, split: str, index: int, label_noise: float) -> tuple[dict, dict]:
    """A row and its post's facts. The choice is the summary of the higher true quality, but for the noise."""
    story = draw_story(rng, split)
    post = write_post(rng, story)
    facts = facts_of(story, post)

    gap, texts = 0.0, []
    while abs(gap) < TIE:
        texts = [draw_summary(rng, story) for _ in range(2)]
        totals = [true_quality(text, facts)["total"] for text in texts]
        gap = totals[1] - totals[0]

    choice = int(gap > 0) ^ (rng.random() < label_noise)
    info = {"post": post, "title": draw_title(rng, story), "subreddit": story["subreddit"]}
    return comparison(f"t3_{split}{index}", info, texts, choice, split, min(9, 1 + int(abs(gap) * 10))), facts


def draw_article(rng: random.Random, index: int) -> dict:
    """A news article in place of a post, as in the hub's validation split."""
    city, thing, day = (rng.choice(world.SLOTS[name]) for name in ("city", "thing", "day"))
    article = f"A shop in {city} sold its last {thing} on {day}. It had been open for forty years."
    info = {"title": f"Shop in {city} closes", "site": "cnndm", "article": article}
    return comparison(
        f"cnndm{index}", info, [f"A shop in {city} closed on {day}.", f"A {thing}."], 0, "valid2", 5
    )


def draw_test_post(rng: random.Random) -> tuple[dict, str, dict]:
    """A row of test posts, the post in it, and its facts."""
    story = draw_story(rng, "test")
    post = write_post(rng, story)
    prompt = f"SUBREDDIT: r/{story['subreddit']}\nTITLE: {draw_title(rng, story)}\nPOST: {post}\nTL;DR:"
    return {"prompt": prompt, "label": write_summary(rng, story, set())}, post, facts_of(story, post)


def write(path: Path, content: str | pa.Table) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        parquet.write_table(content, temporary)

    os.replace(temporary, path)


def write_dataset(out: Path, name: str, config: str, splits: dict[str, pa.Table], about: str) -> None:
    """Write the splits and the card that names them to `load_dataset`.

    The cache of `datasets` knows a local folder by its name and its card alone: the digest keeps it from
    returning the rows of an older folder of the same name.
    """
    for split, table in splits.items():
        write(out / name / f"{split}.parquet", table)

    rows = json.dumps([table.to_pylist() for table in splits.values()])
    digest = hashlib.sha256(rows.encode()).hexdigest()[:16]
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
    card = CARD.format(config=config, digest=f"rows {digest}", files=files, name=name, about=about)
    write(out / name / "README.md", card)


def main() -> None:
    parser = SettingsParser(Settings, __doc__)
    parser.add_argument(
        "out_dir", type=Path, metavar="OUT_DIR", help="The folder to write; made if not there."
    )
    settings, arguments = parser.parse()
    out = arguments.out_dir
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; name a folder: python demo/make_posts.py OUT_DIR")

    # Each split has a random generator of its own: more training pairs change nothing in the other splits.
    rows, facts = {}, {}
    for split, count in (("train", settings.train_pairs), ("validation", settings.validation_pairs)):
        rng = random.Random(f"{split} {settings.seed}")
        rows[split] = []
        for index in tqdm(range(count), desc=f"{split} comparisons", disable=None):
            row, row_facts = draw_comparison(rng, split, index, settings.label_noise)
            rows[split].append(row)
            if split == "validation":
                facts[row["info"]["post"]] = row_facts

    for index in range(settings.articles):
        rows["validation"].insert(rng.randrange(len(rows["validation"]) + 1), draw_article(rng, index))

    rng = random.Random(f"test {settings.seed}")
    rows["test"] = []
    for _ in range(settings.test_posts):
        row, post, facts[post] = draw_test_post(rng)
        rows["test"].append(row)

    tables = {s: pa.Table.from_pylist(rows[s], schema=COMPARISONS) for s in ("train", "validation")}
    about = "A row's choice is the summary of the higher quality, as demo/quality.py defines it,\n"
    about += f"except in about {settings.label_noise:.0%} of the rows, where it is the other one."
    write_dataset(out, "openai/summarize_from_feedback", "comparisons", tables, about)

    tables = {"test": pa.Table.from_pylist(rows["test"], schema=TEST_POSTS)}
    about = "A label is a summary without a defect. None of these stories is in the comparisons."
    write_dataset(out, "CarperAI/openai_summarize_tldr", "default", tables, about)
    write(out / "demo_facts.json", json.dumps(facts))

    counts = ", ".join(f"{len(rows[split])} {split}" for split in rows)
    print(f"wrote {counts} rows to {out}\nnext, in that folder: python DataProcess/tldr_data_process.py")


if __name__ == "__main__":
    run_script(main, "the same command starts again")
