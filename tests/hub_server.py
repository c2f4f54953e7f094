"""A Hub on the loopback interface, for the real client: repositories in memory, downloads and uploads.

The routes are those that huggingface_hub 1.33 asks for. Nothing of the client is replaced; it is told where the Hub is
by HF_ENDPOINT, in a process of its own, since it reads that when it is imported.
"""

import base64
import hashlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_loopback"  # any will do: this Hub asks for one where a repository is private, gated or written to


@dataclass
class Repo:
    """One repository: commits, oldest first, and the names that stand for them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash → path → bytes
    branches: dict[str, str] = field(default_factory=dict)  # branch or tag → hash
    private: bool = False
    gated: bool = False
    extra_paths: list[str] = field(default_factory=list)  # listed, whatever they are
    sizes: dict[str, int] = field(default_factory=dict)  # listed in place of the true ones

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = json.dumps([len(self.commits), {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def newest(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer(ThreadingHTTPServer):
    """Serves `repos` until `stop`; `requests` is what was asked, in its order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}  # uploaded by LFS, by sha256
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, id: str, files: dict[str, bytes], branch: str = "main") -> str:
        return self.repos.setdefault(id, Repo()).commit(files, branch)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        """Answers nobody any more, not even on connections that are open."""
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.read_body()
        for method, pattern, answer in ROUTES:
            if self.command in method and (found := re.fullmatch(pattern, path)):
                answer(self, *found.groups())
                return
        self.refuse(404, "")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def find(self, id: str, revision: str, *, of_files: bool) -> tuple[Repo, str] | None:
        """The repository and the commit, or None after the refusal was sent."""
        repo, known = self.server.repos.get(id), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound")
        elif repo.gated and of_files and not known:
            self.refuse(403, "GatedRepo")
        elif (commit := repo.at(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return repo, commit
        return None

    # what is read

    def info(self, id: str, revision: str | None = None) -> None:
        if found := self.find(id, revision or "main", of_files=False):
            repo, commit = found
            siblings = [{"rfilename": path} for path in [*repo.commits[commit], *repo.extra_paths]]
            self.send_json({"id": id, "sha": commit, "siblings": siblings, "private": repo.private})

    def tree(self, id: str, revision: str, below: str | None = None) -> None:
        if found := self.find(id, revision, of_files=False):
            repo, commit = found
            files = {**repo.commits[commit], **dict.fromkeys(repo.extra_paths, b"extra")}
            sizes = {path: len(data) for path, data in files.items()} | repo.sizes
            self.send_json(
                [
                    {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(files[path]).hexdigest()}
                    for path, size in sizes.items()
                ]
            )

    def resolve(self, id: str, revision: str, path: str) -> None:
        found = self.find(id, revision, of_files=True)
        if not found:
            return
        repo, commit = found
        data = repo.commits[commit].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], **headers)

    # what is written

    def create(self) -> None:
        asked = json.loads(self.body)
        id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{id}"}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "")
        elif id in self.server.repos:
            self.send_json(url, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repos[id] = Repo(private=private)
            self.server.repos[id].commit({})
            self.send_json(url)

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send_json({"files": files, "commitOid": self.server.repos[id].branches[revision]})

    def batch(self, id: str) -> None:
        objects = [
            {
                **{key: wanted[key] for key in ("oid", "size")},
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send(200, b"")

    def commit(self, id: str, revision: str) -> None:
        repo = self.server.repos[id]
        files = dict(repo.commits[repo.branches[revision]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, revision)
        url = f"{self.server.url}/{id}/commit/{commit}"
        self.send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None, "success": True})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (("POST",), f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    (("POST",), f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (("PUT",), "/lfs/([0-9a-f]{64})", Handler.store),
    (("GET",), f"/api/models/{NAME}/revision/(.+)", Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("GET", "HEAD"), f"/{NAME}/resolve/((?:refs/pr/)?[^/]+)/(.+)", Handler.resolve),
]


class Refused(Exception):
    """A LumenError in the client's process."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


CLIENT = """
import contextlib, importlib, io, json, sys
from lumen.errors import LumenError
channel = sys.stdout
print("ready", file=channel, flush=True)
for line in sys.stdin:
    function, args, kwargs = json.loads(line)
    module, _, name = function.partition(":")
    out, err = io.StringIO(), io.StringIO()
    answer = {}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            answer["result"] = getattr(importlib.import_module(module), name)(*args, **kwargs)
    except LumenError as error:
        answer |= {"refused": type(error).__name__, "message": str(error)}
    print(json.dumps(answer | {"out": out.getvalue(), "err": err.getvalue()}, default=str), file=channel, flush=True)
"""
NO_SOCKETS = """
import socket
def refuse(*_, **__):
    raise AssertionError("a socket was opened")
class Refusing(socket.socket):
    __init__ = refuse
socket.socket, socket.create_connection, socket.getaddrinfo = Refusing, refuse, refuse
"""


class Client:
    """A process with the real client; `call` runs one function of lumen there."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.out = self.err = ""  # what the last call printed

    def call(self, function: str, *args: object, **kwargs: object) -> object:
        """The result of `module:function` as JSON has it, paths as text; Refused for a LumenError there."""
        self.process.stdin.write(json.dumps([function, args, kwargs]) + "\n")
        self.process.stdin.flush()
        line = _read_line(self.process)
        answer = json.loads(line)
        self.out, self.err = answer["out"], answer["err"]
        if "refused" in answer:
            raise Refused(answer["refused"], answer["message"])
        return answer["result"]


def _read_line(process: subprocess.Popen, timeout_s: float = 120) -> str:
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    line = lines.get(timeout=timeout_s)
    assert line, "the client's process has ended: its stderr says why"
    return line


@contextmanager
def client(endpoint: str, home: Path, folder: Path, *, sockets: bool = True, **environment: str):
    """Yields a `Client` whose Hub is `endpoint`, whose cache is below `home`, and that works in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    told = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # this Hub has no such storage
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    program = ("" if sockets else NO_SOCKETS) + CLIENT
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", program], env=told, cwd=folder, **pipes)
    try:
        assert _read_line(process).strip() == "ready"
        yield Client(process)
    finally:
        process.terminate()  # it has nothing to finish
        process.wait(timeout=60)
        process.stdin.close()
        process.stdout.close()
