"""As much of the Hugging Face hub as its client needs to download a model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
TOKEN = "hf_right"

_REVISIONS = ("main", "v1", COMMIT)
_INFO = json.dumps({"id": "org/tiny", "sha": COMMIT}).encode()


@dataclass
class Hub:
    """Serves the repository org/tiny, which has a revision `main` and a tag `v1`, both of the commit COMMIT."""

    folder: Path  # of its files
    gated: bool = False  # whether files are given only to those who show TOKEN
    broken: bool = False  # whether it answers everything with 500
    stuck: str = ""  # a file of which half comes, and then nothing
    endpoint: str = ""
    given: list[str] = field(default_factory=list)  # files whose content was asked for
    asked: list[str] = field(default_factory=list)  # "METHOD /path" of all calls
    half_sent: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def serving(self) -> Iterator[None]:
        hub = self

        class Handler(_Handler):
            served = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case _ if self.served.broken:
                self._refuse(500, "")
            case _ if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            case ["api", "agent-harnesses"]:  # by which it finds out who uses it
                self._answer(200, b"{}")
            case ["api", "models", "org", "tiny", *rest]:
                self._about(rest)
            case ["org", "tiny", "resolve", revision, *file] if revision in _REVISIONS:
                self._file("/".join(file))
            case _:
                self._refuse(401, "RepoNotFound")

    def _about(self, rest: list[str]) -> None:
        match rest:
            case []:
                self._answer(200, _INFO)
            case ["revision", revision] if revision in _REVISIONS:
                self._answer(200, _INFO)
            case ["tree", revision] if revision in _REVISIONS:
                folder = self.served.folder
                files = [file for file in folder.rglob("*") if file.is_file()]
                tree = [
                    {"type": "file", "path": str(it.relative_to(folder)), "size": it.stat().st_size, "oid": _etag(it)}
                    for it in files
                ]
                self._answer(200, json.dumps(tree).encode())
            case _:
                self._refuse(404, "RevisionNotFound")

    def _file(self, name: str) -> None:
        file = self.served.folder / name
        if self.served.gated and self.headers.get("Authorization") is None:
            self._refuse(401, "GatedRepo")
        elif not file.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            if self.command == "GET":
                self.served.given.append(name)
            self._answer(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT}, name)

    def _refuse(self, code: int, error: str) -> None:
        self._answer(code, b"", {"X-Error-Code": error})

    def _answer(
        self, code: int, content: bytes, headers: dict[str, str] | None = None, name: str | None = None
    ) -> None:
        self.send_response(code)
        for header, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(OSError):  # of a client that is gone
            if name is not None and name == self.served.stuck:
                self.wfile.write(content[: len(content) // 2])
                self.served.half_sent.set()
                self.served.closing.wait()
                self.close_connection = True
            else:
                self.wfile.write(content)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
