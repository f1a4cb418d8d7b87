"""A server on the loopback that speaks as much of the Hub's protocol as pushing and opening a model takes."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a1B2" * 8


class Hub:
    """Repositories {id: {revision: {path: bytes}}}, what was asked, and what is to go wrong.

    `fail` is {part of a path: status, or "close" to drop the connection in the middle}."""

    def __init__(self):
        self.repos, self.private, self.requests, self.fail, self.blobs = {}, {}, [], {}, {}
        self.pull_requests = []

    def sha(self, repo, revision):
        content = json.dumps(
            {path: hashlib.sha1(data).hexdigest() for path, data in self.files(repo, revision).items()}
        )
        return hashlib.sha1(content.encode()).hexdigest()

    def files(self, repo, revision):
        """Of a branch, or of the branch that has this commit."""
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision]
        return next((files for branch, files in branches.items() if self.sha(repo, branch) == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        for part, status in hub.fail.items():
            if part in path:
                if status == "close":
                    self.close_connection = True
                    self.connection.close()
                    return
                self.answer(status, {"error": "planned"})
                return
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        self.route(hub, path.strip("/").split("/"), body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def route(self, hub, parts, body):
        base = f"http://127.0.0.1:{self.server.server_port}"
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repo in hub.repos:
                self.answer(409, {"error": "You already created this model repo", "url": f"{base}/{repo}"})
                return
            hub.repos[repo] = {"main": {}}
            hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer(200, {"url": f"{base}/{repo}", "id": repo, "name": repo})
        elif parts == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and len(parts) > 4:
            self.models(hub, "/".join(parts[2:4]), parts[4], parts[5:], body, base)
        elif parts[:2] == ["api", "models"]:
            self.models(hub, "/".join(parts[2:4]), "revision", ["main"], body, base)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{base}/blob/{o['oid']}"}}} for o in objects]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif parts[0] == "blob":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            hub.blobs[parts[1]] = body
            self.answer(200)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve(hub, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404, {"error": "not found"})

    def models(self, hub, repo, what, rest, body, base):
        if repo not in hub.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif what == "branch":
            new = rest[0] not in hub.repos[repo]
            hub.repos[repo].setdefault(rest[0], dict(hub.repos[repo]["main"]))
            self.answer(200 if new else 409, {})
        elif what == "preupload":
            asked = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": f["path"], "uploadMode": mode[f["path"].endswith((".safetensors", ".png"))],
                      "shouldIgnore": False} for f in asked]  # fmt: skip
            self.answer(200, {"files": files})
        elif what == "commit":
            self.commit(hub, repo, rest[0], [json.loads(line) for line in body.splitlines()], base)
        elif what in ("revision", "tree") and hub.files(repo, rest[0]) is not None:
            files = hub.files(repo, rest[0])
            if what == "tree":
                self.answer(200, [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                                  for p, d in files.items()])  # fmt: skip
                return
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": repo, "modelId": repo, "sha": hub.sha(repo, rest[0]), "tags": [], "siblings": siblings}
            self.answer(200, facts | {"private": hub.private[repo]})
        else:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")

    def commit(self, hub, repo, revision, lines, base):
        files = dict(hub.repos[repo][revision])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        url = f"{base}/{repo}/commit/0123456789abcdef0123456789abcdef01234567"
        answer = {"commitUrl": url, "commitOid": url[-40:]}
        if "create_pr=1" in self.path:
            hub.pull_requests.append((repo, files))
            answer["pullRequestUrl"] = f"{base}/{repo}/discussions/{len(hub.pull_requests)}"
        else:
            hub.repos[repo][revision] = files
        self.answer(200, answer)

    def resolve(self, hub, repo, revision, path):
        files = hub.files(repo, revision) if repo in hub.repos else None
        if files is None or path not in files:
            code = "EntryNotFound" if files is not None else "RepoNotFound"
            self.answer(404, X_Error_Code=code, X_Repo_Commit=hub.sha(repo, revision) if files is not None else "")
            return
        data, sha = files[path], hub.sha(repo, revision)
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        if self.command == "HEAD":
            self.answer(200, b"", ETag=etag, X_Repo_Commit=sha, Content_Length=str(len(data)))
        else:
            self.answer(200, data, ETag=etag, X_Repo_Commit=sha)


@contextmanager
def running_hub():
    """A Hub, and the address that it can be reached at."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
