"""A chat-completions server that misbehaves on demand, over real sockets on the loopback."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class MisbehavingServer:
    """Answers each request with the next behaviour; the last one is repeated."""

    behaviours: list[Callable[[Responder], None]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    is_closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def will(self, *behaviours: Callable[[Responder], None]) -> MisbehavingServer:
        self.behaviours = list(behaviours)
        return self


class Responder(BaseHTTPRequestHandler):
    """The handler that a behaviour gets: raw writes, and waits that end when the server closes."""

    server_state: MisbehavingServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        state.seen.append(
            Seen(self.path, {name.lower(): value for name, value in self.headers.items()}, json.loads(body or b"{}"))
        )
        behaviour = state.behaviours[min(len(state.seen), len(state.behaviours)) - 1]
        self.close_connection = True
        with contextlib.suppress(OSError):
            behaviour(self)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def pause(self, seconds: float) -> bool:
        """Wait; True when the server is closing."""
        return self.server_state.is_closing.wait(seconds)


@contextlib.contextmanager
def serve(*behaviours: Callable[[Responder], None]) -> Iterator[MisbehavingServer]:
    """Run a server on a free port of the loopback until the block ends."""
    state = MisbehavingServer(list(behaviours))
    handler = type("BoundResponder", (Responder,), {"server_state": state})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    state.port = httpd.server_address[1]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.is_closing.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def respond(status: int, body: bytes, **headers: str) -> Callable[[Responder], None]:
    """A complete response."""

    def behave(responder: Responder) -> None:
        responder.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            responder.send_header(name.replace("_", "-"), value)
        responder.send_header("content-length", str(len(body)))
        responder.end_headers()
        responder.raw(body)

    return behave


def completion(content: str | None, **changes: Any) -> bytes:
    """The body of a chat completion; `changes` replace fields of its only choice."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": "stop",
        **changes,
    }
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    document = {"id": "c1", "object": "chat.completion", "model": "served-model", "choices": [choice], "usage": usage}
    return json.dumps(document).encode()


def answer(content: str | None, **changes: Any) -> Callable[[Responder], None]:
    """A well-formed chat completion with this content."""
    return respond(200, completion(content, **changes))


def error(status: int, message: str = "no") -> Callable[[Responder], None]:
    """An OpenAI-style error."""
    return respond(status, json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode())


def stall_before_headers(responder: Responder) -> None:
    responder.pause(30)


def stall_after_headers(responder: Responder) -> None:
    responder.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n")
    responder.pause(30)


def drip_headers(responder: Responder) -> None:
    responder.raw(b"HTTP/1.1 200 OK\r\nx-slow: ")
    while not responder.pause(0.05):
        responder.raw(b"a")


def drip_body(responder: Responder) -> None:
    responder.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
    while not responder.pause(0.05):
        responder.raw(b" ")


def drip_error_body(responder: Responder) -> None:
    responder.raw(b"HTTP/1.1 500 Oops\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
    while not responder.pause(0.05):
        responder.raw(b" ")


def close_mid_body(responder: Responder) -> None:
    body = completion('{"a": 1}')
    responder.raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body[: len(body) // 2]))


def close_at_once(responder: Responder) -> None:
    responder.connection.close()


def endless_body(responder: Responder) -> None:
    responder.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
    while not responder.pause(0):
        responder.raw(b" " * 65536)


def garbage(responder: Responder) -> None:
    responder.raw(b"\x00\x01SSH-2.0-nonsense\r\n\r\n")
