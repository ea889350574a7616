"""A judge on loopback: a real HTTP server that speaks chat completions and misbehaves on demand.

    with JudgeServer(behaviour=lambda server, question: "429") as server:
        ...  # requests to server.url

`behaviour` names how each request is treated (a key of `answers`); `score` is the judge's opinion of a text.
`server.requests` holds every request, `server.verdicts` counts the good replies that each question was given.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RETRY_AFTER = 1  # seconds; without the header the client's first wait is at most half of that
GIVES_VERDICT = {"good", "fenced", "key in a verdict", "odd numbers"}

Answer = tuple[int, str, dict[str, object]]  # status, body and headers


def quality(texts: dict, position: int) -> int:
    """The opinion of the default judge: the number after "quality" in a summary, or another response."""
    return int(re.search(r"quality (\d+)", list(texts.values())[position]).group(1))


def completion(text: str | None, finish_reason: str = "stop", refusal: str | None = None, **fields) -> Answer:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "loopback-judge"}
    body |= {
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return 200, json.dumps(body | fields), {}


def error(status: int, message: str, **headers: object) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, json.dumps({"error": {"message": message, "type": "error"}}), named


def answers(verdict: dict[str, Any], key: str) -> dict[str, Answer]:
    """What each behaviour sends where `verdict` is due; a careless server repeats the header with the key."""
    text = json.dumps(verdict)
    whole = completion(text)[1]
    return {
        "good": completion(text),
        "fenced": completion(f"Sure, here it is:\n```json\n{text}\n```\nAnything else?"),
        "429": error(429, "slow down", Retry_After_Ms=20),
        "429 bare": error(429, "slow down"),
        "429 wait": error(429, "slow down", Retry_After=RETRY_AFTER),
        "429 for an hour": error(429, "quota is used up", Retry_After=3600),
        "500": error(500, "out of order"),
        "no model": error(404, "there is no such model"),
        "no schema": error(400, "response_format is not supported by this model"),
        "wrong key": error(401, f"Incorrect API key provided: {key}"),
        "cut off": (200, whole[:-40], {"Content-Length": len(whole)}),  # announced, and never comes
        "half a body": (200, whole[:-40], {}),
        "web page": (200, "<html>busy</html>", {"X-Proxy": "yes"}),
        "not a completion": (200, "{}", {}),
        "prose": completion("I like the first one, 8 out of 10."),
        "long prose": completion(f"{key}: I like the first one." + " And more." * 99),
        "refusal": completion(None),
        "cut by length": completion(text, "length"),
        "out of range": completion(json.dumps(verdict | {"score_2": 11})),
        "odd numbers": completion(text, usage={"prompt_tokens": "many", "completion_tokens": None}),
        "repeats the key": error(403, f"{key} may not"),
        "key in an error": error(500, f"no place for {key}"),
        "key in a page": (403, f"<html>{key}</html>", {}),
        "key in a header": error(429, "no", Retry_After=key),
        "key in a refusal": completion(None, refusal=f"I refuse {key}"),
        "key in a verdict": completion(json.dumps(verdict | {"reason": f"For {key}."}), model=key),
    }


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        behaviour: Callable[["JudgeServer", str], str] = lambda server, question: "good",
        score: Callable[[dict, int], int] = quality,
        structured_output: bool = True,
        delay: float = 0.0,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.score = score
        self.structured_output = structured_output
        self.delay = delay
        self.lock = threading.Lock()
        self.released = threading.Event()  # set: hanging connections are closed
        self.requests: list[dict] = []
        self.asked: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.not_before: dict[str, float] = {}
        self.too_early: list[str] = []
        self.under_way = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests; no traceback for it."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        server, key = self.server, self.headers["Authorization"]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            if time.monotonic() < server.not_before.get(question, 0):
                server.too_early.append(question)
            behaviour = server.behaviour(server, question)
            if "response_format" in body and not server.structured_output:
                behaviour = "no schema"
            server.asked[question] += 1
            server.requests.append({"path": self.path, "body": body, "key": key, "behaviour": behaviour})
            server.verdicts.update([question] if behaviour in GIVES_VERDICT else [])
            if behaviour == "429 wait":
                # A little less than promised: the two clocks need not tick together.
                server.not_before[question] = time.monotonic() + 0.9 * RETRY_AFTER
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)

        time.sleep(server.delay)
        with server.lock:
            server.under_way -= 1
        if behaviour == "hang":
            server.released.wait(60)
            self.close_connection = True
            return

        texts = json.loads(question)
        scores = {f"score_{position}": server.score(texts, position) for position in (1, 2)}
        self.send(*answers({"reason": "One is better."} | scores, key)[behaviour])

    def send(self, status: int, text: str, headers: dict[str, object]) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(data)} | headers
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = "Content-Length" in headers
