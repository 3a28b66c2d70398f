"""A Hub on loopback: as much of its interface as pushing, loading and streaming use, kept in memory."""

import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_valid"
READ_TOKEN = "hf_read"
LARGE = (".safetensors", ".parquet")  # take the way of large files, as on the real one


class HubStandIn(http.server.ThreadingHTTPServer):
    """
    Repositories by `type/id`: `{branch: {path: bytes}}`. `fail` holds statuses for the next requests whose path
    contains the text, `[(text, status), ...]`; `requests` is the log.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.blobs = {}, set(), {}
        self.fail, self.requests, self.commits = [], [], []
        self.lock = threading.RLock()
        self.stall = threading.Event()  # while set, uploads hang
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id, kind="models", branch="main"):
        return self.repositories[f"{kind}/{repo_id}"][branch]

    def add_dataset(self, repo_id, files):
        self.repositories[f"datasets/{repo_id}"] = {"main": files}


def commit_hash(files):
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, content=b"", headers=None, kind="application/json"):
        body = json.dumps(content).encode() if isinstance(content, dict | list) else content
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, {"error": message}, headers)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        server, url = self.server, urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        content = self.body()
        with server.lock:
            server.requests.append(f"{self.command} {path}")
            failure = next((f for f in server.fail if f[0] in path), None)
            if failure is not None:
                server.fail.remove(failure)
                self.close_connection = True
                return self.error(failure[1], "the stand-in was told to fail")
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return getattr(self, method)(content, **match.groupdict())
        return self.error(404, f"the stand-in has no {self.command} {path}")

    def may_write(self):
        if self.token not in (TOKEN, READ_TOKEN):
            self.error(401, "Invalid username or password.")
            return False
        if self.token == READ_TOKEN:
            self.error(403, "You don't have the rights to create or write a model")
            return False
        return True

    def repository(self, kind, repo_id):
        key = f"{kind or 'models'}/{repo_id}"
        repository = self.server.repositories.get(key)
        if repository is None or (key in self.server.private and self.token != TOKEN):
            self.error(404, "Repository not found", "RepoNotFound")
            return None
        return repository

    def revision(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id)
        if repository is None:
            return None
        files = repository.get(revision)
        if files is None:
            files = next((f for f in repository.values() if commit_hash(f) == revision), None)
        if files is None:
            self.error(404, "Revision not found", "RevisionNotFound")
        return files

    def whoami(self, content):
        if self.token not in (TOKEN, READ_TOKEN):
            return self.error(401, "Invalid username or password.")
        return self.answer(content={"type": "user", "name": "someone", "orgs": [], "auth": {}})

    def create(self, content):
        if not self.may_write():
            return None
        wanted = json.loads(content)
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        key = f"{wanted.get('type', 'model')}s/{name}"
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if key in self.server.repositories:
            return self.answer(409, url | {"error": "You already created this repository"})
        self.server.repositories[key] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(key)
        return self.answer(content=url)

    def branch(self, content, kind, repo_id, revision):
        if not self.may_write():
            return None
        repository = self.repository(kind, repo_id)
        if revision in repository:
            return self.error(409, "Reference already exists")
        repository[revision] = dict(repository["main"])
        return self.answer()

    def validate(self, content):
        return self.answer(content={"errors": [], "warnings": []})

    def preupload(self, content, kind, repo_id, revision):
        if not self.may_write() or self.revision(kind, repo_id, revision) is None:
            return None
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            }
            for file in json.loads(content)["files"]
        ]
        return self.answer(content={"files": files})

    def lfs_batch(self, content, repo_id):
        if not self.may_write():
            return None
        objects = []
        for entry in json.loads(content)["objects"]:
            actions = {}
            if entry["oid"] not in self.server.blobs:
                actions = {
                    "upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/lfs/verify", "header": {}},
                }
            objects.append(entry | ({"actions": actions} if actions else {}))
        return self.answer(content={"transfer": "basic", "objects": objects})

    def lfs_put(self, content, oid):
        while self.server.stall.is_set():
            self.server.stall.wait(0)
            threading.Event().wait(0.02)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.error(400, "another content than announced")
        self.server.blobs[oid] = content
        return self.answer()

    def lfs_verify(self, content):
        return self.answer(200 if json.loads(content)["oid"] in self.server.blobs else 404)

    def commit(self, content, kind, repo_id, revision):
        if not self.may_write():
            return None
        files = self.revision(kind, repo_id, revision)
        if files is None:
            return None
        header = None
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
            elif entry["key"] == "file":
                import base64

                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        self.server.commits.append((repo_id, revision, header["summary"]))
        oid = commit_hash(files)
        url = f"{self.server.url}/{repo_id}/commit/{oid}"
        return self.answer(content={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, content, kind, repo_id, revision="main"):
        files = self.revision(kind, repo_id, revision)
        if files is None:
            return None
        return self.answer(
            content={
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit_hash(files),
                "private": f"{kind}/{repo_id}" in self.server.private,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def tree(self, content, kind, repo_id, revision, folder=""):
        files = self.revision(kind, repo_id, revision)
        if files is None:
            return None
        prefix, entries = f"{folder}/" if folder else "", {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            head, *rest = path.removeprefix(prefix).split("/")
            if rest and "true" not in [value.lower() for value in self.query.get("recursive", [])]:
                entries[head] = {"type": "directory", "path": prefix + head, "oid": "0" * 40, "size": 0}
            else:
                entries[path] = file_entry(path, files[path])
        if not entries and folder:
            return self.error(404, "Entry not found", "EntryNotFound")
        return self.answer(content=list(entries.values()))

    def paths_info(self, content, kind, repo_id, revision):
        files = self.revision(kind, repo_id, revision)
        if files is None:
            return None
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(content)["paths"]
        else:
            paths = parse_qs(content.decode()).get("paths", [])
        entries = [file_entry(path, files[path]) for path in paths if path in files]
        entries += [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for path in paths
            if path not in files and any(name.startswith(f"{path}/".lstrip("/")) for name in files)
        ]
        return self.answer(content=entries)

    def resolve(self, content, repo_id, revision, file, kind="models"):
        files = self.revision(kind.rstrip("/"), repo_id, revision)
        if files is None:
            return None
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_hash(files)})
        content, status = files[file], 200
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit_hash(files),
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start : end + 1], 206
        return self.answer(status, content, headers, "application/octet-stream")


def file_entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


NAME = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>models|datasets)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/{KIND}/{NAME}/branch/(?P<revision>[^/]+)", "branch"),
    (rf"POST /api/{KIND}/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /api/{KIND}/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"POST /api/{KIND}/{NAME}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"POST /(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>\w+)", "lfs_put"),
    (r"POST /lfs/verify", "lfs_verify"),
    (rf"(?:GET|HEAD) /api/{KIND}/{NAME}", "info"),
    (rf"(?:GET|HEAD) /api/{KIND}/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "tree"),
    (rf"(?:GET|HEAD) /(?P<kind>datasets)/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
]
