"""Stage 5: ask a chat model which of two methods' responses to each prompt is better.

    python Evaluation/GPT4_eval_tldr.py generation_pargs.json generation_args.json

Reads the generations of two methods, A and B, and matches them by prompt. Each pair is judged twice, once
with A shown first and once with B; A wins where both verdicts prefer A, loses where both prefer B, and ties
otherwise. Each verdict is appended to gpt-4-evaluations/A_vs_B.jsonl as it arrives, and a rerun asks only
for what is missing; the result is written to gpt-4-evaluations/A_vs_B_by_JUDGE.json (A and B being the names
of the two files), with criteria of one's own to A_vs_B_by_JUDGE_CRITERIA.json.

Summaries of posts are judged, unless --criteria names a text file that says what a good response is
(Evaluation/dialogue_criteria.txt does for dialogue).

The key is read from OPENAI_API_KEY. With --base_url, any chat-completions server is the judge (vLLM,
`transformers serve`) and the key is optional. --dry_run shows a request and the cost, and sends nothing.
"""

import asyncio
import json
import os
import re
import sys
from collections import deque
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import openai
from judge import (
    RESPONSE_FORMAT,
    SUMMARIES,
    BadReply,
    Criteria,
    Question,
    Verdict,
    ask,
    messages_of,
    own_criteria,
)
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from tqdm import tqdm
from verdict_summary import print_summary, summarise

from pargs.cli import SettingsParser, fail, is_main, run_script, setting
from pargs.files import write_text
from pargs.runs import read_generations

OPENAI_URL = "https://api.openai.com/v1"
OUTPUT_DIR = Path("gpt-4-evaluations")
REPLY_TOKENS = 80  # of a sentence and two numbers; only the estimate uses it
USD_PER_MILLION = (2.5, 10.0)  # tokens read and written: of OpenAI's gpt-4o, assumed
SHOWN_CHARACTERS = 200  # of a reply that is no verdict

Pair = tuple[str, str, str]  # prompt, summary of A, summary of B
Verdicts = dict[Question, Verdict]


@dataclass
class Settings:
    model: str = setting("gpt-4o", "The judge. OpenAI has announced the end of gpt-4o for 2027-01-14.")
    base_url: str = setting(OPENAI_URL, "Where the judge is served, e.g. http://localhost:8000/v1.")
    criteria: str | None = setting(None, "A text file: what a good response is. Unset: a good summary.")
    num_prompts: NonNegativeInt = setting(100, "Prompts to judge, drawn with the seed; 0 means all.")
    seed: int = setting(42, "Of the draw; a larger draw contains the smaller one.")
    temperature: NonNegativeFloat = setting(0.0, "Of the judge; models that reason accept only 1.")
    max_tokens: PositiveInt = setting(1024, "Longest reply in tokens; a model that reasons needs more.")
    concurrency: PositiveInt = setting(8, "Requests under way at the same time.")
    max_retries: NonNegativeInt = setting(
        8, "How often a request that failed, or got no verdict, is repeated."
    )
    timeout: PositiveFloat = setting(60.0, "Seconds to wait for a judge that is silent.")
    allow_unjudged: bool = setting(
        False, "Report without the pairs for which no usable verdict could be had."
    )
    usd_per_million_input: NonNegativeFloat | None = setting(
        None, "Price of a million tokens read. Unset: at OpenAI 2.5 is assumed, elsewhere no cost is shown."
    )
    usd_per_million_output: NonNegativeFloat | None = setting(
        None, "Price of a million tokens written. Unset: at OpenAI 10 is assumed."
    )
    dry_run: bool = setting(False, "Print one request and the estimated cost; send nothing.")


def parse_command_line() -> tuple[Path, Path, Settings]:
    parser = SettingsParser(Settings, __doc__)
    parser.add_argument("file_a", type=Path, metavar="A.json", help="generations of method A")
    parser.add_argument("file_b", type=Path, metavar="B.json", help="generations of method B")
    settings, files = parser.parse()
    if not settings.base_url.startswith(("http://", "https://")):
        fail(f"--base_url must begin with http:// or https://, not {settings.base_url!r}")
    settings.base_url = settings.base_url.rstrip("/")
    if files.file_a.resolve() == files.file_b.resolve():
        fail(f"{files.file_a} would be judged against itself; name the generations of two methods")
    return files.file_a, files.file_b, settings


def read_criteria(settings: Settings) -> Criteria:
    """What the judge is told."""
    if settings.criteria is None:
        return SUMMARIES
    try:
        text = Path(settings.criteria).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read --criteria {settings.criteria!r}: {error}")
    if not text.strip():
        fail(f"--criteria {settings.criteria!r} is empty; it says what a good response is")
    return own_criteria(text)


def read_summaries(path: Path) -> dict[str, str]:
    """Map each prompt to its summary, the first of several: prompts are the sample, none counts twice."""
    generations = read_generations(path)
    if not generations:
        fail(f"{path} holds no responses")
    summaries: dict[str, str] = {}
    for generation in generations:
        summaries.setdefault(generation.prompt, generation.result)
    if further := len(generations) - len(summaries):
        print(f"{path}: {further} further summaries of a prompt are left out")
    return summaries


def match(file_a: Path, file_b: Path) -> list[Pair]:
    """Pair the summaries by prompt, in the order of A."""
    results_a, results_b = read_summaries(file_a), read_summaries(file_b)
    pairs = [
        (prompt, result, results_b[prompt]) for prompt, result in results_a.items() if prompt in results_b
    ]
    if not pairs:
        fail(
            f"{file_a} and {file_b} have no prompt in common; "
            "generate both with the same --dataset and --prompt_seed"
        )
    # A file keeps what was written for prompts that a later run did not ask for.
    only_a, only_b = len(results_a) - len(pairs), len(results_b) - len(pairs)
    if only_a or only_b:
        print(f"left out: {only_a} prompts that are only in {file_a}, {only_b} only in {file_b}")
    return pairs


def draw(pairs: list[Pair], settings: Settings) -> list[Pair]:
    """`num_prompts` of the pairs in their order.

    They are those that stand first in an order of all prompts: a larger draw contains the smaller one, and
    prompts that were decoded since push out as many as come in.
    """
    drawn = sorted(pairs, key=lambda pair: blake2b(json.dumps([settings.seed, pair[0]]).encode()).digest())
    chosen = {prompt for prompt, _, _ in drawn[: settings.num_prompts or None]}
    return [pair for pair in pairs if pair[0] in chosen]


def questions_about(pair: Pair, criteria: Criteria, settings: Settings) -> list[Question]:
    about = (settings.model, settings.temperature, criteria.digest)
    return [Question(*pair, order, *about) for order in ("AB", "BA")]


def read_verdicts(log: Path) -> Verdicts:
    """All verdicts recorded so far, whatever they are about. What follows the last newline is unfinished."""
    try:
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    except OSError as error:
        fail(f"cannot read {log}: {error}")

    verdicts: Verdicts = {}
    for number, line in enumerate(lines, start=1):
        try:
            question = TypeAdapter(Question).validate_json(line)
            verdicts.setdefault(question, Verdict.model_validate_json(line))
        except ValidationError:
            fail(f"{log}, line {number} is no verdict; delete the line, and its question is asked again")
    return verdicts


def drop_unfinished_line(log: Path) -> None:
    """Cut what a run that was killed while writing left behind, so that the next verdict starts a line."""
    data = log.read_bytes() if log.exists() else b""
    finished = data.rfind(b"\n") + 1
    if finished < len(data):
        os.truncate(log, finished)
        print(f"Dropped an unfinished last line of {log}")


def shared_request(settings: Settings) -> dict:
    """The part of a request that is the same for all questions."""
    return {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_completion_tokens": settings.max_tokens,
        "response_format": RESPONSE_FORMAT,
    }


def print_estimate(missing: list[Question], criteria: Criteria, settings: Settings) -> None:
    """Say what the missing verdicts will cost. The judge's tokenizer is not known: 4 characters a token."""
    schema = len(json.dumps(RESPONSE_FORMAT))
    chats = [messages_of(question, criteria=criteria) for question in missing]
    characters = sum(schema + sum(len(message["content"]) for message in chat) for chat in chats)
    tokens_in, tokens_out = characters // 4, len(missing) * REPLY_TOKENS
    print(
        f"Estimate: {tokens_in:,} tokens in (characters / 4), {tokens_out:,} out ({REPLY_TOKENS} a reply)"
        + dollars(tokens_in, tokens_out, settings)
    )


def dollars(tokens_in: int, tokens_out: int, settings: Settings) -> str:
    """ ", $..." at the prices given, or at OpenAI those assumed; nothing of a server of one's own."""
    given = (settings.usd_per_million_input, settings.usd_per_million_output)
    usual = USD_PER_MILLION if settings.base_url == OPENAI_URL else (0.0, 0.0)
    if given == (None, None) and usual == (0.0, 0.0):
        return ""
    price_in, price_out = (own if own is not None else other for own, other in zip(given, usual, strict=True))
    cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return f", ${cost:.2f} (assuming ${price_in:.2f} per million tokens in and ${price_out:.2f} out)"


def print_request(question: Question, criteria: Criteria, settings: Settings) -> None:
    request = shared_request(settings) | {"messages": messages_of(question, criteria=criteria)}
    print(f"\nPOST {settings.base_url}/chat/completions")
    print(json.dumps(request, indent=2, ensure_ascii=False))
    print("\nDry run: nothing was sent.")


def read_key(settings: Settings) -> str:
    """The key, or "" for a judge of one's own that asks for none."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and settings.base_url == OPENAI_URL:
        fail("OPENAI_API_KEY is not set, nothing was sent; export your key, or name a judge with --base_url")
    if not (key.isascii() and key.isprintable()) or " " in key:
        fail("OPENAI_API_KEY holds characters that no key has, nothing was sent")
    return key


async def judge_all(
    missing: list[Question], total: int, log: Path, key: str, criteria: Criteria, settings: Settings
) -> tuple[str | None, list[str]]:
    """Ask the missing questions, `concurrency` at a time, and append each verdict to `log` as it arrives.

    Returns why the run had to stop early, if it had to, and the questions to which no reply was a verdict.
    Such a question does not keep the others from being asked. A judge that cannot be asked does: the
    requests under way are still waited for and recorded, no new one is sent.
    """
    waiting = deque(missing)
    stopped: list[str] = []
    unjudged: list[str] = []
    request = shared_request(settings)
    bad_replies: list[str] = []

    def show_first(error: BadReply) -> None:
        """A judge that never understands would else be paid for every question before anybody saw why."""
        if not bad_replies:
            said = " ".join(without_key(error.text, key).split())
            shown = f": {said[:SHOWN_CHARACTERS]!r}{' ...' * (len(said) > SHOWN_CHARACTERS)}" if said else ""
            line = f"warning: the first unusable reply {without_key(str(error), key)}{shown}"
            tqdm.write(f"{line}; --max_retries says how often such a question is repeated", file=sys.stderr)
        bad_replies.append(str(error))

    async def worker() -> None:
        while waiting:
            question = waiting.popleft()
            try:
                verdict = await ask(client, request, question, criteria, settings.max_retries, show_first)
            except openai.APIError as error:
                waiting.clear()
                stopped.append(explain(error, key, settings))
            except BadReply as error:
                said = without_key(str(error), key)
                unjudged.append(f"{question.prompt[:60]!r} in the order {question.order}: the reply {said}")
            else:
                verdict.reason = without_key(verdict.reason, key)  # the server's own words, both
                verdict.served_model = without_key(verdict.served_model, key)
                file.write(json.dumps(asdict(question) | verdict.model_dump()) + "\n")
                file.flush()
                progress.update()

    limits = {"timeout": settings.timeout, "max_retries": settings.max_retries}
    client = openai.AsyncOpenAI(api_key=key or "none", base_url=settings.base_url, **limits)
    progress = tqdm(total=total, initial=total - len(missing), desc="judging", unit="verdict", disable=None)
    with progress, log.open("a", encoding="utf-8") as file:
        async with client:
            await asyncio.gather(*(worker() for _ in range(settings.concurrency)))
    return (stopped[0] if stopped else None), unjudged


def explain(error: openai.APIError, key: str, settings: Settings) -> str:
    """One line on why the judge cannot be asked, in which the key never appears."""
    url = settings.base_url
    if isinstance(error, openai.AuthenticationError):
        # The server's own words are left out: they may repeat the key.
        return f"{url} does not accept the key in OPENAI_API_KEY" if key else f"{url} needs OPENAI_API_KEY"

    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else None
        message = f"{url} answers with status {error.status_code}: {said or error.message}"
        if wait := error.response.headers.get("retry-after"):
            message += f" (Retry-After: {wait})"
    else:
        message = f"no reply from {url}: {error} {error.__cause__ or ''}"
    return " ".join(without_key(message, key).split())[:500]


def without_key(text: str, key: str) -> str:
    """A server may repeat the key that it was sent; we do not."""
    return text.replace(key, "[key]") if key else text


def get_verdicts(
    missing: list[Question], total: int, log: Path, criteria: Criteria, settings: Settings
) -> str | None:
    """Have the missing verdicts written to `log`. Returns what went wrong, in a line, or None."""
    key = read_key(settings)
    try:
        OUTPUT_DIR.mkdir(exist_ok=True)
        drop_unfinished_line(log)
        stopped, unjudged = asyncio.run(judge_all(missing, total, log, key, criteria, settings))
    except OSError as error:
        fail(f"cannot write {log}: {error}")

    if stopped or not unjudged:
        return stopped
    problem = f"{len(unjudged)} questions have no verdict, one is {unjudged[0]}"
    if settings.allow_unjudged:
        print(problem)
        return None
    return f"{problem} (--allow_unjudged reports without them)"


def report(
    pairs: list[Pair], verdicts: Verdicts, about: dict[str, Any], criteria: Criteria, settings: Settings
) -> dict:
    """Print and return the summary of the pairs that have both verdicts; it names the others."""
    judged, unjudged = [], []
    for pair in pairs:
        ab, ba = (verdicts.get(question) for question in questions_about(pair, criteria, settings))
        if ab and ba:
            judged.append((pair[0], ab, ba))
        else:
            unjudged.append(pair[0])
    if not judged:
        fail("no pair has both verdicts: there is nothing to report")

    summary: dict[str, Any] = {**about, **summarise(judged), "unjudged": unjudged}
    print_summary(summary)
    read, written = summary["input_tokens"], summary["output_tokens"]
    print(f"These verdicts took {read:,} tokens in and {written:,} out{dollars(read, written, settings)}")
    return summary


def result_path(log: Path, settings: Settings) -> Path:
    """The result's file, named by judge and criteria as well: a second judge leaves the first one's."""
    parts = [log.stem, "by", settings.model, *([Path(settings.criteria).stem] if settings.criteria else [])]
    return log.with_name(re.sub(r"[^\w.-]+", "-", "_".join(parts)) + ".json")


def main() -> None:
    file_a, file_b, settings = parse_command_line()
    if not is_main():
        return  # each question is asked, and paid for, once
    criteria = read_criteria(settings)
    log = OUTPUT_DIR / f"{file_a.stem}_vs_{file_b.stem}.jsonl"

    pairs = draw(match(file_a, file_b), settings)
    questions = {question: None for pair in pairs for question in questions_about(pair, criteria, settings)}
    verdicts = read_verdicts(log)
    missing = [question for question in questions if question not in verdicts]

    print(f"{len(pairs)} pairs in both orders: {len(missing)} of {len(questions)} verdicts are missing")
    if others := len(verdicts.keys() - questions.keys()):
        print(f"{log} also holds {others} verdicts on other texts, models or wordings; they are not counted")
    if settings.dry_run:
        print_request(missing[0] if missing else next(iter(questions)), criteria, settings)
    print_estimate(missing, criteria, settings)
    if settings.dry_run:
        return

    problem = get_verdicts(missing, len(questions), log, criteria, settings) if missing else None
    verdicts = read_verdicts(log)
    if problem:
        done = sum(question in verdicts for question in questions)
        fail(f"{problem}; {done} of {len(questions)} verdicts are in {log}, rerun the command for the rest")

    about = {"file_a": str(file_a), "file_b": str(file_b), "model": settings.model}
    about |= {"criteria": settings.criteria, "template": criteria.digest}
    about |= {"temperature": settings.temperature, "seed": settings.seed}
    summary = report(pairs, verdicts, about, criteria, settings)

    result = result_path(log, settings)
    write_text(result, json.dumps(summary, indent=2) + "\n")
    print(f"Wrote {result}; every verdict, with its reason, is in {log}")


if __name__ == "__main__":
    run_script(main, "the same command asks for the verdicts that are missing")
