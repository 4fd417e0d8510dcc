"""The routes of ``hub.py``: what the stand-in for the Hugging Face Hub answers to a request, and what it keeps."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.card_rules import check_card, metadata

if TYPE_CHECKING:
    from support.hub import HubServer

LFS_PATTERNS = ["*.arrow", "*.bin", "*.ckpt", "*.gz", "*.npy", "*.npz", "*.onnx", "*.parquet", "*.pt", "*.safetensors"]
LFS_FROM = 10 * 1024**2
"""Bytes from which any file is kept by Git LFS."""
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
DATE = "2000-01-01T00:00:00.000Z"
"""Of everything: no test is about dates."""


class Refusal(Exception):
    """An answer that is an error; ``code`` is what the client makes RepositoryNotFoundError and its like of."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """A request as it came; ``sent`` are the bytes of the answer's body, ``status`` is its code."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0
    status: int | None = None

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    def matches(self, pattern: str) -> bool:
        return re.search(pattern, f"{self.method} {self.path}") is not None


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    id: str
    kind: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by Git LFS, by SHA-256, whether a commit names it or not."""

    def resolve(self, revision: str) -> str:
        name = revision.removeprefix("refs/heads/")
        commit = self.branches.get(name) or (revision if revision in self.commits else None)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        tree = [(path, git_id(content)) for path, content in sorted(files.items())]
        oid = hashlib.sha1(repr((self.branches.get(branch), len(self.commits), title, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(title, files)
        self.branches[branch] = oid
        return oid


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size >= LFS_FROM or (size > 0 and any(fnmatch.fnmatch(Path(path).name, name) for name in LFS_PATTERNS))


def folders(files: dict[str, bytes]) -> set[str]:
    return {str(parent) for path in files for parent in Path(path).parents} - {"."}


def entry(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """What the Hub tells about a file or a folder."""
    if path not in files:
        inside = sorted((name, git_id(content)) for name, content in files.items() if name.startswith(f"{path}/"))
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(repr(inside).encode()).hexdigest()}
    content = files[path]
    size = len(content)
    if not is_lfs(path, size):
        return {"type": "file", "path": path, "size": size, "oid": git_id(content)}
    oid = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
    lfs = {"oid": oid, "sha256": oid, "size": size, "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": size, "oid": git_id(pointer), "lfs": lfs}


REPO = r"(?P<repo>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
PLAIN = rf"/(?P<kind>datasets/)?{REPO}"
AT = r"/(?P<revision>[^/]+)"
ROUTES = {
    "whoami": "GET /api/whoami-v2",
    "create_repo": "POST /api/repos/create",
    "validate_yaml": "POST /api/validate-yaml",
    "info": rf"GET {API}(?:/revision{AT})?",
    "tree": rf"GET {API}/tree{AT}(?:/(?P<path>.*))?",
    "paths_info": rf"POST {API}/paths-info{AT}",
    "create_branch": rf"POST {API}/branch/(?P<name>[^/]+)",
    "preupload": rf"POST {API}/preupload{AT}",
    "commit": rf"POST {API}/commit{AT}",
    "lfs_batch": rf"POST {PLAIN}\.git/info/lfs/objects/batch",
    "lfs_put": r"PUT /lfs/(?P<secret>\w+)",
    "resolve": rf"(?:GET|HEAD) {PLAIN}/resolve{AT}/(?P<path>.+)",
}
WRITES = {"create_branch", "preupload", "commit", "lfs_batch"}


class Api:
    """One request. Methods are the routes; they answer with an :class:`Answer` or with what becomes JSON."""

    def __init__(self, hub: HubServer, request: Request, body: bytes) -> None:
        self.hub, self.request, self.body = hub, request, body
        self.query = parse_qs(urlsplit(request.path).query)
        self.logged_in = request.authorization is not None

    def call(self) -> object:
        if self.request.authorization not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        path = urlsplit(self.request.path).path
        for route, pattern in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.request.method} {path}"):
                # Revisions and paths are quoted one by one: "refs%2Fpr%2F1" is one part of the address.
                parts = {name: unquote(part) for name, part in match.groupdict(default="").items()}
                if "repo" in parts:
                    self.open(parts.pop("kind"), parts.pop("repo"), parts.pop("revision", ""), route in WRITES)
                return getattr(self, route)(**parts)
        if re.search("^/api/(models|datasets)/|/resolve/", path):
            raise self.no_repository()
        raise Refusal(404, f"This stand-in for the Hub does not serve {self.request.method} {path}")

    def open(self, kind: str, repo: str, revision: str, write: bool) -> None:
        repository = self.hub.repositories.get(("dataset" if kind.startswith("dataset") else "model", repo))
        if repository is None or (repository.private and not self.logged_in):
            raise self.no_repository()
        if write:
            self.must_log_in()
        self.repository, self.revision = repository, revision
        self.sha = repository.resolve(revision or "main")
        self.files = repository.commits[self.sha].files

    def no_repository(self) -> Refusal:
        # To strangers the Hub does not tell whether a repository is private or is not there. The client would know
        # what such a 401 means without a code, but of https addresses only.
        message = "Repository not found" if self.logged_in else "Invalid username or password."
        return Refusal(404 if self.logged_in else 401, message, "RepoNotFound")

    def must_log_in(self) -> None:
        if not self.logged_in:
            raise Refusal(401, "Invalid username or password.")

    def json(self) -> Any:
        return json.loads(self.body)

    def address(self, repository: Repository) -> str:
        return f"{self.hub.url}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.id}"

    def whoami(self) -> object:
        self.must_log_in()
        access = {"accessToken": {"displayName": "tests", "role": "write"}}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": access}

    def create_repo(self) -> object:
        self.must_log_in()
        wanted = self.json()
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.hub.user
        # "private" is how huggingface_hub 1 says it.
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = Repository(f"{owner}/{wanted['name']}", kind, private)
        if owner != self.hub.user or kind not in ("model", "dataset"):
            raise Refusal(403, f"This stand-in for the Hub has no repositories of {owner!r} or of type {kind!r}")
        result = {"url": self.address(repository), "name": repository.id}
        if (kind, repository.id) in self.hub.repositories:
            result["error"] = f"You already created this {kind} repo: {repository.id}"
            return Answer(json.dumps(result).encode(), 409, {"Content-Type": "application/json"})
        repository.commit("main", "initial commit", {".gitattributes": GIT_ATTRIBUTES})
        self.hub.repositories[kind, repository.id] = repository
        return result

    def validate_yaml(self) -> Answer:
        readme, kind = self.json()["content"], self.json().get("repoType") or "model"
        errors = list(check_card(readme, kind))
        warnings = [] if errors or metadata(readme) else ["empty or missing yaml metadata in repo card"]
        if self.request.headers.get("accept") == "text/plain":
            text = "\n".join([f"- Error: {error}" for error in errors] + [f"- Warning: {line}" for line in warnings])
        else:
            found = {"errors": errors, "warnings": warnings}
            text = json.dumps({name: [{"message": line} for line in lines] for name, lines in found.items()})
        return Answer(text.encode(), 400 if errors else 200)

    def info(self) -> object:
        siblings = []
        for path in sorted(self.files):
            file = entry(path, self.files)
            more = (
                {"size": file["size"], "blobId": file["oid"], "lfs": file.get("lfs")} if "blobs" in self.query else {}
            )
            siblings.append({"rfilename": path, **more})
        card = metadata(self.files.get("README.md", b"").decode()) or {}
        answer = {
            "id": self.repository.id,
            "author": self.hub.user,
            "sha": self.sha,
            "private": self.repository.private,
        }
        answer |= {
            "lastModified": DATE,
            "createdAt": DATE,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
        }
        return answer | {"tags": card.get("tags") or [], "cardData": card, "siblings": siblings}

    def tree(self, path: str) -> object:
        if path and path not in folders(self.files):
            raise Refusal(404, f"{path} does not exist on {self.revision}", "EntryNotFound")
        prefix = f"{path}/" if path else ""
        deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        inside = [name for name in sorted({*self.files, *folders(self.files)}) if name.startswith(prefix)]
        return [entry(name, self.files) for name in inside if deep or "/" not in name.removeprefix(prefix)]

    def paths_info(self) -> object:
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [entry(path, self.files) for path in wanted if path in self.files or path in folders(self.files)]

    def create_branch(self, name: str) -> object:
        if name in self.repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        self.repository.branches[name] = self.repository.resolve(self.json().get("startingPoint") or "main")
        return {}

    def preupload(self) -> object:
        answers = []
        for path, size in ((file["path"], file["size"]) for file in self.json()["files"]):
            known = entry(path, self.files) if path in self.files else {}
            oid = known.get("lfs", known).get("oid")  # the client leaves out files of which this is the hash
            mode = "lfs" if is_lfs(path, size) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self) -> object:
        answers = []
        for wanted in self.json()["objects"]:
            answers.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.repository.objects:
                secret = secrets.token_hex()
                self.hub.uploads[secret] = (self.repository, wanted["oid"])
                answers[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{secret}"}}
        return {"transfer": "basic", "objects": answers}

    def lfs_put(self, secret: str) -> Answer:
        repository, oid = self.hub.uploads.get(secret, (None, ""))
        if repository is None or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(403 if repository is None else 400, "no such upload, or other content than was announced")
        repository.objects[oid] = self.body
        return Answer()

    def commit(self) -> object:
        if self.revision not in self.repository.branches:
            raise Refusal(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        files, title = dict(self.files), ""
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, self.sha):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.repository.objects:
                files[value["path"]] = self.repository.objects[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"{key}: not understood, not there, or not uploaded: {value}")
        oid = self.repository.commit(self.revision, title, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.address(self.repository)}/commit/{oid}"}

    def resolve(self, path: str) -> Answer:
        if path not in self.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=self.sha)
        content, file = self.files[path], entry(path, self.files)
        etag = f'"{file.get("lfs", file)["oid"]}"'
        headers = {"X-Repo-Commit": self.sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if "lfs" in file:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": etag}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request.range or "")
        if wanted is None or self.request.method == "HEAD":
            return Answer(content, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return Answer(content[start:end], 206, headers)
