"""A model hub on this machine: as much of the hub's HTTP interface as its own client uses to publish and to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: Files by path of every commit, by ``user/name`` and commit.
        heads: Commit of each branch, by ``user/name``.
        private: Repositories that were made private.
        asked: Method and path of every request.
        tokens: Authorizations that came with requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + files[name] for name in sorted(files))
        name = hashlib.sha1(repository.encode() + str(len(self.commits[repository])).encode() + content).hexdigest()
        self.commits[repository][name] = files
        self.heads[repository][branch] = name
        return name

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[repository][self.heads[repository][branch]]


class _Requests(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self._answer({"error": code}, 401 if code == "RepoNotFound" else 404, X_Error_Code=code, X_Error_Message=code)

    def _begin(self) -> list[str]:
        self.server.asked.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _found(self, repository: str, revision: str) -> str | None:
        """The commit; None after a refusal."""
        if repository not in self.server.heads:
            self._refuse("RepoNotFound")
            return None
        commit = self.server.heads[repository].get(revision, revision)
        if commit not in self.server.commits[repository]:
            self._refuse("RevisionNotFound")
            return None
        return commit

    def do_GET(self) -> None:
        match self._begin():
            case [user, name, "resolve", revision, *path]:
                commit = self._found(repository := f"{user}/{name}", revision)
                if commit is None:
                    return
                content = self.server.commits[repository][commit].get("/".join(path))
                if content is None:
                    self._refuse("EntryNotFound")
                    return
                etag = hashlib.sha1(content).hexdigest()
                self._answer(content, X_Repo_Commit=commit, ETag=f'"{etag}"')
            case ["api", "models", user, name, "tree", revision, *_]:
                if (commit := self._found(repository := f"{user}/{name}", revision)) is not None:
                    files = self.server.commits[repository][commit]
                    self._answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
            case ["api", "models", user, name, *rest]:
                revision = rest[1] if rest[:1] == ["revision"] else "main"
                if (commit := self._found(repository := f"{user}/{name}", revision)) is not None:
                    files = self.server.commits[repository][commit]
                    siblings = [{"rfilename": path} for path in files]
                    self._answer({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
            case _:
                self._refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        parts = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match parts:
            case ["api", "validate-yaml"]:
                front = json.loads(body)["content"].split("---")[1]
                self._answer({"errors": [] if "library_name: " in front else [{"message": "no head"}], "warnings": []})
            case ["api", "repos", "create"]:
                given = json.loads(body)
                repository = f"{given.get('organization', 'me')}/{given['name']}"
                exists = repository in self.server.heads
                if not exists:
                    self.server.commits[repository], self.server.heads[repository] = {}, {}
                    self.server.commit(repository, "main", {".gitattributes": b""})
                    if given.get("private") or given.get("visibility") == "private":
                        self.server.private.add(repository)
                url = f"{self.server.address}/{repository}"
                self._answer({"url": url, "name": repository}, 409 if exists else 200)
            case ["api", "models", user, name, "branch", branch]:
                heads = self.server.heads[f"{user}/{name}"]
                exists = branch in heads
                heads.setdefault(branch, heads["main"])
                self._answer({}, 409 if exists else 200)
            case ["api", "models", _, _, "preupload", _]:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self._answer({"files": [f | {"shouldIgnore": False} for f in files]})
            case ["api", "models", user, name, "commit", branch]:
                repository = f"{user}/{name}"
                if self._found(repository, branch) is None:
                    return
                files = dict(self.server.files(repository, branch))
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        files.pop(line["value"]["path"], None)
                commit = self.server.commit(repository, branch, files)
                url = f"{self.server.address}/{repository}/commit/{commit}"
                self._answer({"success": True, "commitOid": commit, "commitUrl": url})
            case _:
                self._refuse("EntryNotFound")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub on a free port of this machine, until the end of the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
