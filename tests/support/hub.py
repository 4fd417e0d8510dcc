"""A local stand-in for the Hugging Face Hub, for tests that push and load without the Internet.

The clients are the real ones (huggingface_hub, transformers, sentence-transformers, datasets): ``HF_ENDPOINT`` tells
them to speak to :class:`HubServer`, which answers their HTTP requests (``hub_api.py``) from repositories in memory. It
was written from what huggingface_hub 1.5 and 2.4 send and expect, not from the Hub's code; ``test_hub_double.py`` shows
with the clients what may be relied on.

What it has: one user with one token; model and dataset repositories, private ones too; branches, commits, and
loading by either; regular and Git-LFS files, the latter uploaded apart (the "basic" transfer); Range requests;
the error codes that the client makes its exceptions of; the check of cards' metadata (``card_rules.py``).

What it leaves out: Xet storage (:meth:`HubServer.environment` turns it off: huggingface_hub 2 uploads large files by
Xet without asking the server whether it may), redirects to a CDN, tags, pull requests, discussions,
organisations, gated repositories, Spaces, histories, deleting and renaming of repositories, ``.gitignore``, abbreviated
commit ids, pages of long listings, search, the dataset viewer, rate limits, and what the Hub computes from files.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets.config
import huggingface_hub
import pytest
import transformers.utils.hub

from support.hub_api import Answer, Api, Refusal, Repository, Request


@dataclass
class Fault:
    """The error with which the next ``times`` requests that match are answered."""

    pattern: str
    times: int
    status: int


class HubServer:
    """The server, a context manager. ``home`` is an empty folder for what clients keep (``HF_HOME``)."""

    user = "tester"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.token = f"hf_{secrets.token_hex(17)}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, tuple[Repository, str]] = {}
        """Where a file is to be PUT, which needs no token: the Hub's addresses for that are signed."""
        self.lock = threading.Lock()
        self._faults: list[Fault] = []
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What is in a repository, by path."""
        repository = self.repositories[repo_type, repo_id]
        return repository.commits[repository.resolve(revision)].files

    def requested(self, pattern: str) -> list[Request]:
        """The requests so far whose ``"METHOD /path?query"`` a regular expression is found in."""
        return [request for request in self.requests if request.matches(pattern)]

    def fail(self, pattern: str, times: int = 1, status: int = 503) -> None:
        """Answer the next requests that ``pattern`` is found in (as in :meth:`requested`) with ``status``."""
        self._faults.append(Fault(pattern, times, status))

    def seen(self, request: Request) -> Fault | None:
        """Note a request; the fault that is to happen to it, which is used up."""
        with self.lock:
            self.requests.append(request)
            fault = next((f for f in self._faults if f.times > 0 and request.matches(f.pattern)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    def environment(self) -> dict[str, str]:
        """The environment for a fresh process that is to speak to this server, logged in."""
        others = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", name)}
        return others | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts downloads at another host
            "NO_PROXY": "127.0.0.1",
        }

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the clients in this process speak to this server: they read the environment when they are imported."""
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
        constants: dict[str, object] = {
            "ENDPOINT": self.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
        }
        for name, constant in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, constant)
        # `huggingface_hub.create_repo` and its like are methods of this object, which was made with the old address.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made when it is needed
        for name in ("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"):
            monkeypatch.setattr(datasets.config, name, False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        huggingface_hub.close_session()  # it may know a proxy
        huggingface_hub.HfFileSystem.clear_instance_cache()  # their listings are kept by address, and ports come again


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news; what fails in here is answered with 500."""


class Handler(BaseHTTPRequestHandler):
    """HTTP: requests become calls of a :class:`Api`, its results become answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers)
        fault = self.server.hub.seen(request)
        answer = self.answer(request, b"".join(self.body()), fault.status if fault is not None else None)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else answer.body
        request.sent, request.status = len(sent), answer.status
        self.wfile.write(sent)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, request: Request, body: bytes, fails: int | None) -> Answer:
        try:
            if fails is not None:
                raise Refusal(fails, "The server fails because it was told to")
            with self.server.hub.lock:
                found = Api(self.server.hub, request, body).call()
            if isinstance(found, Answer):
                return found
            return Answer(json.dumps(found, default=str).encode(), headers={"Content-Type": "application/json"})
        except Refusal as refusal:
            headers = {"Content-Type": "application/json", **refusal.headers}
            return Answer(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)
        except Exception as error:
            return Answer(f"The stand-in for the Hub has failed: {error!r}".encode(), 500)

    def body(self) -> Iterator[bytes]:
        """The request's body, of no known length where it is sent in chunks."""
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        while length := int(self.rfile.readline(), 16) if chunked else int(self.headers.get("Content-Length", 0)):
            yield self.rfile.read(length)
            if not chunked:
                return
            self.rfile.readline()
        if chunked:
            self.rfile.readline()
