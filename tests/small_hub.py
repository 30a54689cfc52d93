"""A hub in this process, which `huggingface_hub` talks to as to the real one."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMITS = ("a" * 40, "b" * 40)


class Hub:
    """One repository, `owner/name`; each file that is fetched moves `main` to the next commit.

    Attributes:
      commits: the files of each commit, content by name; the keys are 40 digits.
      moves: the commits that `main` is yet to name.
      main: the commit that `main` names.
      asked: (method, revision, file) of each request.
    """

    def __init__(self, commits: dict[str, dict[str, bytes]]):
        self.commits = commits
        self.main, *self.moves = commits
        self.asked: list[tuple[str, str, str]] = []

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        *repository, resolve, revision, file = path.lstrip("/").split("/")
        self.asked.append((method, revision, file))
        if repository != ["owner", "name"] or resolve != "resolve":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.main if revision == "main" else revision
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if file not in self.commits[commit]:
            return 404, {"X-Error-Code": "EntryNotFound", **headers}, b""
        content = self.commits[commit][file]
        if method == "GET" and self.moves:
            self.main = self.moves.pop(0)
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **headers}, content


@contextlib.contextmanager
def serve(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Makes `hub` the one that is fetched from, into a cache of its own, until it is left."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, headers, content = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    fetch = partial(huggingface_hub.hf_hub_download, endpoint=endpoint, cache_dir=cache)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("no_proxy", "127.0.0.1")
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr(huggingface_hub, "hf_hub_download", fetch)
            yield
    finally:
        server.shutdown()
        server.server_close()
