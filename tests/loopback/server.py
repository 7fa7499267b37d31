"""A Hugging Face Hub on the loopback interface, for tests: model repositories in memory, over real HTTP.

It speaks what `huggingface_hub` asks for when it creates a repository, uploads (git and LFS), tags, lists and
downloads. Commits are immutable snapshots. Users are known by token; `Hub.fail` injects faults by rule.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # a new repository holds .gitattributes


@dataclass(frozen=True)
class File:
    """One file of a commit. `lfs` files are known by SHA-256, the others by their git blob id."""

    data: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: str | None
    tree: Mapping[str, File]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


class Repo:
    """A model repository with the branch `main`."""

    def __init__(self, name: str, private: bool) -> None:
        self.name, self.private = name, private
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self.main = ""
        self.commit("initial commit", {".gitattributes": File(ATTRIBUTES, lfs=False)})

    def commit(self, title: str, tree: Mapping[str, File]) -> Commit:
        content = sorted((path, file.etag) for path, file in tree.items())  # caches go by commit
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {title} {content}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, self.main or None, dict(tree))
        self.main = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get({"main": self.main, **self.tags}.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a reader finds at a revision, without `.gitattributes`."""
        tree = self.at(revision).tree
        return {path: file.data for path, file in tree.items() if path != ".gitattributes"}

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the oldest to `revision`."""
        found, commit = [], self.at(revision)
        while commit is not None:
            found.insert(0, commit)
            commit = self.commits.get(commit.parent)
        return found

    def edit(self, **files: bytes | None) -> None:
        """A commit as a person makes it on the web page; None deletes."""
        tree = {**self.at("main").tree, **{path: data and File(data, lfs=False) for path, data in files.items()}}
        self.commit("edited by hand", {path: file for path, file in tree.items() if file is not None})


@dataclass
class User:
    name: str
    organizations: tuple[str, ...] = ()
    write: bool = True

    def owns(self, repo: str) -> bool:
        return repo.split("/")[0] in (self.name, *self.organizations)


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path repository" matches `where`, `times` times (None: always)."""

    where: str
    status: int | None = None  # answer this, having done nothing
    cut: str | None = None  # close the connection: "before" or amid the "body", or after the work, before the "reply"
    delay: float = 0.0  # seconds before the request is looked at
    gate: threading.Event | None = None  # no answer until it is set
    message: str = "injected fault"
    code: str = ""  # the name that the Hub gives the error, such as "GatedRepo"
    times: int | None = 1
    hits: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    status: int | None  # None: cut


class Hub(ThreadingHTTPServer):
    """The server; `start` and `stop` may alternate, on the same port, and the repositories stay.

    Attributes:
        users: by token.
        repos: by id.
        requests: all that came, in the order in which they were answered.
        lfs: whether a path of a repository goes to LFS.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, users: Mapping[str, User]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users, self.repos, self.requests = dict(users), {}, []
        self.lfs: Callable[[str], bool] = lambda path: path.endswith(".safetensors")
        self.objects: dict[tuple[str, str], bytes] = {}  # LFS objects by repository and SHA-256
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._open: set[socket.socket] = set()
        self._thread: threading.Thread | None = None
        self._bound = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> Hub:
        if not self._bound:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self._bound = True
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse connections from now on; open ones are cut."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()
        self._thread, self._bound = None, False
        for connection in list(self._open):
            _reset(connection)

    def fail(self, where: str, **fault: Any) -> Fault:
        """Inject a [`Fault`]; the earliest one that matches and is not used up applies."""
        self.faults.append(Fault(where, **fault))
        return self.faults[-1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error of ours
            super().handle_error(request, client_address)


def _reset(connection: socket.socket) -> None:
    """Close with a reset, as a dying network does."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Reply(Exception):
    """An answer; raised, since most of them end a request early."""

    def __init__(self, status: int, content: Any = None, **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _error(status: int, message: str, code: str = "", **headers: str) -> _Reply:
    coded = {"X_Error_Code": code} if code else {}
    return _Reply(status, {"error": message}, X_Error_Message=message, **coded, **headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), b""
        path = unquote(url.path) if "/resolve/" in url.path else url.path
        found = [
            (re.fullmatch(pattern, path), route) for methods, pattern, route in _ROUTES if self.command in methods
        ]
        match, route = next(((match, route) for match, route in found if match), (None, None))
        self.repo_name = unquote(match.groupdict().get("repo") or "") if match else ""
        if route is _Handler.create:  # the name is in the body
            self.body = self._read()
            content = json.loads(self.body)
            user = self.server.users.get(self._token())
            self.repo_name = f"{content.get('organization') or (user.name if user else '?')}/{content['name']}"
        fault = self._fault(f"{self.command} {url.path} {self.repo_name}")
        if fault is not None:
            time.sleep(fault.delay)
            if fault.gate is not None:
                fault.gate.wait()
            if fault.cut in ("before", "body"):
                if fault.cut == "body":
                    self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                return self._cut()
        self.body = self.body or self._read()
        if fault is not None and fault.status is not None:
            return self._send(_error(fault.status, fault.message, fault.code))
        try:
            with self.server.lock:
                if match is None:
                    raise _error(404, f"no route {self.command} {url.path}")
                route(self, **{key: unquote(value) for key, value in match.groupdict().items() if key != "repo"})
            raise AssertionError("a route must answer")
        except _Reply as reply:
            if fault is not None and fault.cut == "reply":
                return self._cut()
            self._send(reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---- plumbing ------------------------------------------------------------------------------------------------

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self, line: str) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if (fault.times is None or fault.hits < fault.times) and re.search(fault.where, line):
                    fault.hits += 1
                    return fault
        return None

    def _note(self, status: int | None) -> None:
        with self.server.lock:
            self.server.requests.append(Request(self.command, self.path, self.body, status))

    def _cut(self) -> None:
        self._note(None)
        self.close_connection = True
        _reset(self.connection)

    def _send(self, reply: _Reply) -> None:
        self._note(reply.status)
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.data)

    # ---- who may do what -----------------------------------------------------------------------------------------

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _user(self) -> User | None:
        token = self._token()
        if token and token not in self.server.users:
            raise _error(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def _repo(self, write: bool = False) -> Repo:
        user, repo = self._user(), self.server.repos.get(self.repo_name)
        if repo is None or (repo.private and not (user and user.owns(repo.name))):
            raise _error(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            raise _error(401, "Invalid username or password.")
        if write and not (user.write and user.owns(repo.name)):
            raise _error(403, "Forbidden: you don't have the required permissions to write to this repository")
        return repo

    def _commit(self, revision: str, write: bool = False) -> tuple[Repo, Commit]:
        repo = self._repo(write)
        commit = repo.at(revision)
        if commit is None:
            raise _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    # ---- routes --------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _error(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
        raise _Reply(
            200, {"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}}
        )

    def create(self) -> None:
        user, content = self._user(), json.loads(self.body)
        if user is None:
            raise _error(401, "Invalid username or password.")
        if not (user.write and user.owns(self.repo_name)):
            raise _error(403, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.server.url}/{self.repo_name}", "name": self.repo_name, "id": self.repo_name}
        if self.repo_name in self.server.repos:
            raise _Reply(409, {"error": "You already created this model repo", **url})
        self.server.repos[self.repo_name] = Repo(self.repo_name, content.get("visibility") == "private")
        raise _Reply(200, url)

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in metadata_errors(json.loads(self.body)["content"])]
        raise _Reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, revision: str = "main") -> None:
        repo, commit = self._commit(revision)
        raise _Reply(
            200,
            {
                "_id": "0",
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit.oid,
                "private": repo.private,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "tags": [],
                "siblings": [{"rfilename": path} for path in commit.tree],
            },
        )

    def auth_check(self) -> None:
        self._repo()
        raise _Reply(200)

    def auth_check_write(self) -> None:
        self._repo(write=True)
        raise _Reply(200)

    def refs(self) -> None:
        repo = self._repo()
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repo.tags.items()]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main}]
        raise _Reply(200, {"branches": branches, "tags": tags, "converts": []})

    def commits(self, revision: str) -> None:
        repo, _ = self._commit(revision)
        listed = [
            {"id": one.oid, "title": one.title, "message": "", "date": one.date, "authors": []}
            for one in reversed(repo.history(revision))
        ]
        raise _Reply(200, listed)

    def tree(self, revision: str, folder: str = "") -> None:
        _, commit = self._commit(revision)
        folder = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: file for path, file in sorted(commit.tree.items()) if path.startswith(folder)}
        if folder and not inside:
            raise _error(404, "Entry not found", "EntryNotFound")
        parents = {path[:at] for path in inside for at in range(len(folder), len(path)) if path[at] == "/"}
        listed = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(parents)]
        listed += [_entry(path, file) for path, file in inside.items()]
        raise _Reply(200, [one for one in listed if deep or "/" not in one["path"][len(folder) :]])

    def paths_info(self, revision: str) -> None:
        _, commit = self._commit(revision)
        wanted = parse_qs(self.body.decode())["paths"] if self.body[:1] != b"{" else json.loads(self.body)["paths"]
        raise _Reply(200, [_entry(path, commit.tree[path]) for path in wanted if path in commit.tree])

    def preupload(self, revision: str) -> None:
        _, commit = self._commit(revision, write=True)
        answers = []
        for one in json.loads(self.body)["files"]:
            answer = {
                "path": one["path"],
                "uploadMode": "lfs" if self.server.lfs(one["path"]) else "regular",
                "shouldIgnore": False,
            }
            if one["path"] in commit.tree:
                answer["oid"] = commit.tree[one["path"]].etag
            answers.append(answer)
        raise _Reply(200, {"files": answers})

    def lfs_batch(self) -> None:
        repo = self._repo(write=True)
        answers = []
        for one in json.loads(self.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if (repo.name, one["oid"]) not in self.server.objects:
                base = f"{self.server.url}/lfs/{repo.name}"
                actions = {"upload": f"{base}/{one['oid']}", "verify": f"{base}/{one['oid']}/verify"}
                answer["actions"] = {name: {"href": href} for name, href in actions.items()}
            answers.append(answer)
        raise _Reply(200, {"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _error(400, "the content does not have the announced SHA-256")
        self.server.objects[self.repo_name, oid] = self.body
        raise _Reply(200)

    def lfs_verify(self, oid: str) -> None:
        raise _Reply(200) if (self.repo_name, oid) in self.server.objects else _error(404, "no such object")

    def commit(self, revision: str) -> None:
        repo, head = self._commit(revision, write=True)
        if revision != "main":
            raise _error(400, f"{revision} is not a branch")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head.oid):
            raise _error(412, "The parent commit is not the head of the branch")
        tree = dict(head.tree)
        for key, value in ((line["key"], line["value"]) for line in lines):
            path = value.get("path", "")
            if ".." in path.split("/") or path.startswith("/"):
                raise _error(400, f"invalid path {path}")
            if key == "file":
                tree[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if (repo.name, value["oid"]) not in self.server.objects:
                    raise _error(400, f"LFS object {value['oid']} was not uploaded")
                tree[path] = File(self.server.objects[repo.name, value["oid"]], lfs=True)
            elif key == "deletedFile":
                if tree.pop(path, None) is None:
                    raise _error(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                tree = {name: file for name, file in tree.items() if not name.startswith(path)}
        new = repo.commit(header["summary"], tree)
        url = f"{self.server.url}/{repo.name}/commit/{new.oid}"
        raise _Reply(200, {"success": True, "commitOid": new.oid, "commitUrl": url})

    def tag(self, revision: str) -> None:
        if self.command == "DELETE":
            repo = self._repo(write=True)
            raise _Reply(200) if repo.tags.pop(revision, None) else _error(404, "no such tag", "RevisionNotFound")
        repo, commit = self._commit(revision, write=True)
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise _error(409, "Tag reference exists already")
        repo.tags[name] = commit.oid
        raise _Reply(200)

    def resolve(self, revision: str, path: str) -> None:
        _, commit = self._commit(revision)
        file = commit.tree.get(path)
        if file is None:
            raise _error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept_Ranges": "bytes"}
        if file.lfs:
            headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span and self.command == "GET":
            first, last = int(span[1]), int(span[2] or len(file.data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(file.data)}"
            raise _Reply(206, file.data[first : last + 1], **headers)
        raise _Reply(200, file.data, **headers)


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
    return {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.data), **lfs}


def metadata_errors(card: str) -> list[str]:
    """Return what the Hub refuses in a model card's metadata, as far as a card of ours could get it wrong."""
    block = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    if not block:
        return []  # no metadata is a warning there
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    return [*_id_errors(data), *_type_errors(data), *_model_index_errors(data)]


def _id_errors(data: dict[str, Any]) -> Iterator[str]:
    for key in ("base_model", "datasets"):
        value = data.get(key)
        for name in value if isinstance(value, list) else [value]:
            if name is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(name)):
                yield f'"{key}" with value "{name}" is not valid: it must be an id on the Hub'


def _type_errors(data: dict[str, Any]) -> Iterator[str]:
    for key in ("license", "pipeline_tag", "library_name"):
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in ("tags", "metrics"):
        if not all(isinstance(one, str) for one in data.get(key) or []):
            yield f'"{key}" must be an array of strings'


def _model_index_errors(data: dict[str, Any]) -> Iterator[str]:
    needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
    for i, model in enumerate(data.get("model-index") or []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            yield f'"model-index[{i}]" needs "name" and "results"'
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            yield from (f'"{where}.{a}.{b}" is required' for a, b in needed if not (result.get(a) or {}).get(b))
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or metric.get("value") is None:
                    yield f'"{where}.metrics" need "type" and "value"'


_API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", _API + r"/auth-check", _Handler.auth_check),
    ("GET", _API + r"/auth-check/write", _Handler.auth_check_write),
    ("GET", _API + r"/refs", _Handler.refs),
    ("GET", _API + r"/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST DELETE", _API + r"/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
