"""A server on 127.0.0.1 that answers as the Hugging Face hub does, or as badly as a test wants."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """What a path gives: `requests` of them, then nothing but a closed connection (None: always)."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # what the header says, None: the truth
    requests: int | None = None


def hub_file(body: bytes, **arguments) -> Answer:
    """A file as the hub serves it; the ETag is the SHA-256 of `body`, unless it is given."""
    etag = arguments.pop("etag", hashlib.sha256(body).hexdigest())
    return Answer(body, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, **arguments)


def hub_error(status: int, code: str) -> Answer:
    return Answer(status=status, headers={"X-Error-Code": code, "X-Error-Message": code})


@dataclass
class Server:
    url: str
    answers: dict[str, Answer]
    requests: list[str] = field(default_factory=list)  # "GET /path"


@contextlib.contextmanager
def serve(answers: dict[str, Answer]):
    """Serves `answers` by path; what is not among them is a missing file of a repository that exists."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body: bool):
            server.requests.append(f"{self.command} {self.path}")
            answer = answers.get(self.path, hub_error(404, "EntryNotFound"))
            if answer.requests is not None:
                answer.requests -= 1
                if answer.requests < 0:
                    self.close_connection = True
                    return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            if with_body:
                self.wfile.write(answer.body)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}", answers)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
