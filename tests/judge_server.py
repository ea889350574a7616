"""A judge on loopback: a real HTTP server that speaks chat completions and misbehaves on demand.

    with JudgeServer(behaviour=lambda server, question: "429") as server:
        ...  # requests to server.url

`behaviour` names how each request is treated (a key of BEHAVIOURS); `score` is the judge's opinion of a text.
`server.requests` holds every request, `server.verdicts` counts the good replies that each question was given.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RETRY_AFTER = 1  # seconds; without the header the client's first wait is at most half of that


def quality(texts: dict, position: int) -> int:
    """The opinion of the default judge: the number after "quality" in a summary."""
    return int(re.search(r"quality (\d+)", texts[f"summary_{position}"]).group(1))


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
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            if time.monotonic() < self.server.not_before.get(question, 0):
                self.server.too_early.append(question)
            behaviour = self.server.behaviour(self.server, question)
            if "response_format" in body and not self.server.structured_output:
                behaviour = "no schema"
            self.server.asked[question] += 1
            self.server.requests.append(
                {
                    "path": self.path,
                    "body": body,
                    "key": self.headers["Authorization"],
                    "behaviour": behaviour,
                }
            )
            if behaviour in GIVES_VERDICT:
                self.server.verdicts[question] += 1
            self.server.under_way += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.under_way)

        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.under_way -= 1
        BEHAVIOURS[behaviour](self, question)

    def send(self, status: int, body: str, headers: dict | None = None, cut: int = 0) -> None:
        """Send `body`, of which the last `cut` bytes are announced but never come."""
        data = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        self.close_connection = cut > 0

    def refuse(self, status: int, message: str, headers: dict | None = None) -> None:
        self.send(status, json.dumps({"error": {"message": message, "type": "error"}}), headers)

    def completion(
        self,
        text: str | None,
        finish_reason: str = "stop",
        model: str = "loopback-judge",
        refusal: str | None = None,
    ) -> str:
        return json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 0,
                "model": model,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text, "refusal": refusal},
                        "finish_reason": finish_reason,
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        )

    def verdict(self, question: str, **changes: object) -> str:
        texts = json.loads(question)
        fields = {"reason": "One is better."}
        fields |= {f"score_{position}": self.server.score(texts, position) for position in (1, 2)}
        return json.dumps(fields | changes)

    def echo(self, text: str = "{}") -> str:
        """What a careless server repeats: the header that holds the key."""
        return text.format(self.headers["Authorization"])

    def wait_first(self, question: str) -> None:
        # A little less than promised: the two clocks need not tick together.
        self.server.not_before[question] = time.monotonic() + 0.9 * RETRY_AFTER
        self.refuse(429, "slow down", {"Retry-After": RETRY_AFTER})

    def hang(self, question: str) -> None:
        self.server.released.wait(60)
        self.close_connection = True


BEHAVIOURS: dict[str, Callable[[Handler, str], None]] = {
    "good": lambda handler, q: handler.send(200, handler.completion(handler.verdict(q))),
    "fenced": lambda handler, q: handler.send(
        200, handler.completion(f"Sure, here it is:\n```json\n{handler.verdict(q)}\n```\nAnything else?")
    ),
    "429": lambda handler, q: handler.refuse(429, "slow down", {"Retry-After-Ms": 20}),
    "429 bare": lambda handler, q: handler.refuse(429, "slow down"),
    "429 wait": Handler.wait_first,
    "429 for an hour": lambda handler, q: handler.refuse(429, "quota is used up", {"Retry-After": 3600}),
    "500": lambda handler, q: handler.refuse(500, "out of order"),
    "hang": Handler.hang,
    "cut off": lambda handler, q: handler.send(200, handler.completion(handler.verdict(q)), cut=40),
    "half a body": lambda handler, q: handler.send(200, handler.completion(handler.verdict(q))[:-40]),
    "web page": lambda handler, q: handler.send(200, "<html>busy</html>", {"X-Proxy": "yes"}),
    "not a completion": lambda handler, q: handler.send(200, "{}"),
    "prose": lambda handler, q: handler.send(200, handler.completion("I like the first one, 8 out of 10.")),
    "refusal": lambda handler, q: handler.send(200, handler.completion(None)),
    "cut by length": lambda handler, q: handler.send(200, handler.completion(handler.verdict(q), "length")),
    "out of range": lambda handler, q: handler.send(200, handler.completion(handler.verdict(q, score_2=11))),
    "wrong key": lambda handler, q: handler.refuse(
        401, f"Incorrect API key provided: {handler.headers['Authorization']}"
    ),
    "repeats the key": lambda handler, q: handler.refuse(403, f"{handler.headers['Authorization']} may not"),
    "key in an error": lambda handler, q: handler.refuse(500, handler.echo("no place for {}")),
    "key in a page": lambda handler, q: handler.send(403, handler.echo("<html>{}</html>")),
    "key in a header": lambda handler, q: handler.refuse(429, "no", {"Retry-After": handler.echo()}),
    "key in a refusal": lambda handler, q: handler.send(
        200, handler.completion(None, refusal=handler.echo("I refuse {}"))
    ),
    "key in a verdict": lambda handler, q: handler.send(
        200, handler.completion(handler.verdict(q, reason=handler.echo("For {}.")), model=handler.echo())
    ),
    "odd numbers": lambda handler, q: handler.send(
        200,
        json.dumps(
            {"choices": json.loads(handler.completion(handler.verdict(q)))["choices"]}
            | {"usage": {"prompt_tokens": "many", "completion_tokens": None}}
        ),
    ),
    "no schema": lambda handler, q: handler.refuse(400, "response_format is not supported by this model"),
    "no model": lambda handler, q: handler.refuse(404, "there is no such model"),
}
GIVES_VERDICT = {"good", "fenced", "key in a verdict", "odd numbers"}
