"""A stand-in for the Hugging Face Hub on 127.0.0.1: repositories of models and data sets, in memory, as far as
huggingface_hub and datasets ask."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

USER = "me"  # whose repository NAME without USER/ is
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet")


@contextmanager
def local_hub():
    """`with local_hub() as hub:` a running Hub; `hub.environment` is what a process needs to use it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()


class Hub:
    """Repositories and the content of their files.

    repositories: {"USER/NAME": [(commit id, {path: sha256 of the content}), ...]}, oldest first; a data set's name is
        "datasets/USER/NAME".
    contents: {sha256: bytes}
    private: the names of the private ones.
    """

    def __init__(self, address):
        self.address, self.repositories, self.contents, self.lock = address, {}, {}, threading.Lock()
        self.private = set()

    @property
    def environment(self):
        """Variables to be set before huggingface_hub is imported."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": "t", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, name):
        """{path: bytes} of the newest commit."""
        return {path: self.contents[digest] for path, digest in self.repositories[name][-1][1].items()}

    def keep(self, content):
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest

    def commit(self, name, lines):
        """Apply the lines of a commit, one JSON object each; return its id."""
        with self.lock:
            history = self.repositories[name]
            files = dict(history[-1][1])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self.keep(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.contents:
                        raise ValueError(f"commit of {value['path']}, whose content was never sent")
                    files[value["path"]] = value["oid"]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            commit = hashlib.sha1(f"{name} {len(history)} {sorted(files.items())}".encode()).hexdigest()
            history.append((commit, files))
            return commit

    def find(self, name, revision="main"):
        """(commit id, {path: sha256}) or None."""
        history = self.repositories[name]
        return history[-1] if revision == "main" else next((c for c in history if c[0] == revision), None)

    def describe(self, path, digest):
        """A file as the API lists it."""
        content = self.contents[digest]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Request(BaseHTTPRequestHandler):
    """One request; `ROUTES` says which method answers which path."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.hub, url = self.server.hub, urlparse(self.path)
        self.query, self.body = parse_qs(url.query), self.read_body()
        writes = self.command in ("POST", "PUT", "DELETE") and not url.path.endswith(("validate-yaml", "paths-info"))
        if writes and "/lfs/" not in url.path and not self.headers.get("Authorization"):
            return self.refuse(401, "Invalid username or password.")
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, unquote(url.path))
            if match:
                name = match.groupdict().get("name")
                if name and name not in self.hub.repositories:
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                return method(self, **match.groupdict())
        self.refuse(404, f"the stand-in knows no {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def log_message(self, *_):
        pass

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, value=None, status=200, content=None, **headers):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, message, code=""):
        self.send({"error": message}, status, **{"X-Error-Code": code, "X-Error-Message": message})

    def validate(self):
        self.send({"errors": [], "warnings": []})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        full = f"datasets/{name}" if asked.get("type") == "dataset" else name
        there = full in self.hub.repositories
        if (asked.get("private") or asked.get("visibility") == "private") and not there:
            self.hub.private.add(full)
        self.hub.repositories.setdefault(full, [(git_id(full.encode()), {})])
        self.send({"url": f"{self.hub.address}/{full}", "name": name}, 409 if there else 200)

    def delete(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        del self.hub.repositories[f"datasets/{name}" if wanted.get("type") == "dataset" else name]
        self.send({})

    def preupload(self, name):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [(p, "lfs" if p.endswith(LFS_SUFFIXES) else "regular") for p in paths]
        self.send({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes]})

    def batch(self, name):
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.body)["objects"]]
        for o in objects:
            if o["oid"] not in self.hub.contents:
                o["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}}
        self.send({"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, digest):
        same = self.hub.keep(self.body) == digest
        self.send({}, 200 if same else 400)

    def commit(self, name):
        commit = self.hub.commit(name, map(json.loads, self.body.splitlines()))
        self.send({"success": True, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def tree(self, name, revision, folder=None):
        _, files = self.hub.find(name, revision)
        inside = f"{folder.strip('/')}/" if folder else ""
        result = {path: digest for path, digest in files.items() if path.startswith(inside)}
        if inside and not result:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, digest in sorted(result.items()):
            parts = path.removeprefix(inside).split("/")
            for depth in range(1, len(parts)) if deep else [1] if len(parts) > 1 else []:
                parent = inside + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            if deep or len(parts) == 1:
                entries[path] = self.hub.describe(path, digest)
        self.send(list(entries.values()))

    def paths_info(self, name, revision):
        _, files = self.hub.find(name, revision)
        asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        entries = [self.hub.describe(path, files[path]) for path in asked if path in files]
        self.send(entries + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders])

    def info(self, name, revision="main"):
        commit, files = self.hub.find(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        plain, private = name.removeprefix("datasets/"), name in self.hub.private
        self.send({"id": plain, "modelId": plain, "sha": commit, "private": private, "tags": [], "siblings": siblings})

    def resolve(self, name, revision, path):
        commit, files = self.hub.find(name, revision) or ("", {})
        if path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = self.hub.contents[files[path]]
        tag = files[path] if path.endswith(LFS_SUFFIXES) else git_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not part:
            return self.send(content=content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(content=content[first : last + 1], status=206, **headers)


NAME = r"(?P<name>(?:datasets/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/|(?=datasets/)){NAME}"
ROUTES = [
    (r"/api/validate-yaml", Request.validate),
    (r"/api/repos/create", Request.create),
    (r"/api/repos/delete", Request.delete),
    (rf"{API}/preupload/main", Request.preupload),
    (rf"{API}/commit/main", Request.commit),
    (rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Request.tree),
    (rf"{API}/paths-info/(?P<revision>[^/]+)", Request.paths_info),
    (rf"{API}(/revision/(?P<revision>[^/]+))?", Request.info),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Request.batch),
    (r"/lfs/(?P<digest>[0-9a-f]{64})", Request.upload),
    (rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Request.resolve),
]


def run_script(hub, script, cwd, lines=1):
    """Run a script in a process of its own, with the Hub of `hub` and a cache of its own.

    Returns:
        the last line that it prints; for `lines` above 1, the list of the last lines.
    """
    environment = {**os.environ, **hub.environment, "HF_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines()[-lines:]
    return printed if lines > 1 else printed[0]
