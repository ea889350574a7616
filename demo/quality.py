"""What makes a summary good in the demo's world: six qualities, each from 0 to 1, and their weighted total.

The same function labels the preferences that the reward models learn from and judges what policies write. It
reads free text: it looks for the words of the post's facts, not for a form that the generator uses.
"""

import re
from itertools import pairwise


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


WEIGHTS = {
    "event": 0.3,
    "people": 0.2,
    "question": 0.2,
    "no_invention": 0.15,
    "no_repetition": 0.05,
    "brevity": 0.1,
}
BRIEF_WORDS, LONG_WORDS = 22, 40  # brevity is 1 up to the first, 0 from the second on

# Words that claim nothing about the post: grammar, and what any writer may say about any problem.
NEUTRAL = frozenset(
    split_words("""
        a about after again against all also although always am an and another any anymore anyone
        anything are as ask at back bad be because been before being but by can could did difficult do
        does doing down even every everyone for from get gets getting go going got had has have he help
        her here hers him his honestly how i if in into is it its just keep keeps know like long lot
        made make makes many may me might more much must my myself need never no nobody not nothing now
        of off on once one only or our out over own people please problem question really right said
        say saying says she should simply since so some somebody someone something still story such
        sure take tell than that the their them then there these they thing things this those time to
        too told try trying up us very want wants was way we weird well were what whatever when where
        which while who why will with without wonder wondering worth would wrong yet you your advice
        anyway basically best better bit happened sorry start short situation thought thoughts s t m
        re ve tl dr
    """)
)


def stem(word: str) -> str:
    """Cut the usual English endings, so that "selling", "sells" and "sell" are one word."""
    for ending in ("ing", "ied", "ies", "ed", "es", "s", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break

    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def share_said(text: str, concepts: list[str]) -> float:
    """The share of concepts that the text names. A concept is "a/b": spellings, each the start of a word."""
    spellings = ["|".join(map(re.escape, concept.split("/"))) for concept in concepts]
    return sum(bool(re.search(rf"(?<!\w)(?:{s})", text.lower())) for s in spellings) / len(concepts)


def true_quality(summary: str, facts: dict) -> dict[str, float]:
    """Judge a summary by the facts of its post (person, roles, event, question, words: see make_posts.py).

    event          share of the main event's concepts that are named
    people         1 if the first person named is the one the post is about, 0.5 if named later, else 0
    question       share of the question's concepts that are named, halved if nothing is asked
    no_invention   1, less a half for each word that neither the post nor a stated synonym of it contains
    no_repetition  1, less a third for each run of three words, or word at once, that was there before
    brevity        1 up to 22 words, falling to 0 at 40
    total          their mean with WEIGHTS; an empty summary has no quality at all
    """
    words = split_words(summary)
    if not words:
        return dict.fromkeys([*WEIGHTS, "total"], 0.0)

    named = [word for word in words if word in facts["roles"]]
    person = facts["person"]
    people = 1.0 if named[:1] == [person] else 0.5 if person in named else 0.0

    asks = "?" in summary or re.search(r"\b(wonder|want to know|need to know|advice on)", summary.lower())
    question = share_said(summary, facts["question"]) * (1.0 if asks else 0.5)

    known = set(facts["words"])
    invented = {word for word in words if word not in NEUTRAL and stem(word) not in known}

    runs = list(zip(words, words[1:], words[2:], strict=False))
    repeated = len(runs) - len(set(runs)) + sum(a == b for a, b in pairwise(words))

    scores = {
        "event": share_said(summary, facts["event"]),
        "people": people,
        "question": question,
        "no_invention": max(0.0, 1 - len(invented) / 2),
        "no_repetition": max(0.0, 1 - repeated / 3),
        "brevity": min(1.0, max(0.0, (LONG_WORDS - len(words)) / (LONG_WORDS - BRIEF_WORDS))),
    }
    return scores | {"total": sum(WEIGHTS[name] * score for name, score in scores.items())}
