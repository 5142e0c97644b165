"""A stand-in of the Hugging Face Hub's HTTP interface: one process's memory, on localhost."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator


class _Handler(http.server.BaseHTTPRequestHandler):
  """Repositories are dictionaries: name -> commits, the last one first; a commit is its files."""

  repos: dict[str, list[dict[str, bytes]]]
  protocol_version = "HTTP/1.1"

  def log_message(self, format, *args):
    pass

  def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    if "Content_Length" not in headers:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def _json(self, value, code: int = 200) -> None:
    self._answer(code, json.dumps(value).encode(), Content_Type="application/json")

  def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
    commits = self.repos.get(name, [])
    for i, files in enumerate(commits):
      sha = f"{len(commits) - i:040}"
      if revision in (sha, "main"):
        return sha, files
    message = "RevisionNotFound" if commits else "RepoNotFound"
    self._answer(404, X_Error_Code=message, X_Error_Message=message)
    return None

  def do_GET(self):
    path = self.path.split("?")[0]
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path):
      if commit := self._commit(*found.groups()):
        files = [
          {"rfilename": n, "path": n, "type": "file", "size": len(x), "oid": _etag(x)}
          for n, x in commit[1].items()
        ]
        tree = "/tree/" in path
        self._json(files if tree else {"id": found[1], "sha": commit[0], "siblings": files})
    elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
      if commit := self._commit(found[1], found[2]):
        if found[3] not in commit[1]:
          self._answer(404, X_Error_Code="EntryNotFound")
          return
        body = commit[1][found[3]]
        self._answer(
          200, body, ETag=f'"{_etag(body)}"', X_Repo_Commit=commit[0], Content_Length=str(len(body))
        )
    else:
      self._answer(404)

  do_HEAD = do_GET

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.path == "/api/repos/create":
      value = json.loads(body)
      name = "/".join(filter(None, (value.get("organization"), value["name"])))
      exists = name in self.repos
      self.repos.setdefault(name, [{}])
      self._json({"url": f"http://localhost/{name}"}, 409 if exists else 200)
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", self.path):
      names = [f["path"] for f in json.loads(body)["files"]]
      files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
      self._json({"files": files})
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", self.path):
      files = dict(self.repos[found[1]][0])
      for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
          files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      self.repos[found[1]].insert(0, files)
      sha = f"{len(self.repos[found[1]]):040}"
      url = f"http://localhost/{found[1]}/commit/{sha}"
      self._json({"success": True, "commitOid": sha, "commitUrl": url})
    elif self.path == "/api/validate-yaml":
      self._json({"errors": [], "warnings": []})
    else:
      self._answer(404)


def _etag(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, dict]]:
  """(its address, its repositories) while the block runs."""
  handler = type("Handler", (_Handler,), {"repos": {}})
  server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
  thread.start()
  try:
    yield f"http://localhost:{server.server_port}", handler.repos
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
