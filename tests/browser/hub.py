"""A Hugging Face Hub of one process: as much of its interface as pushing and pulling a small file needs."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Answers for repositories in `files`, by "repository/path"; takes any token."""

    files: dict[str, bytes]
    tokens: set[str]
    commit = "0" * 40

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.tokens.add(self.headers.get("Authorization", ""))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "commit" in parts:
            repository = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{repository}/{line['value']['path']}"] = content
            address = f"http://{self.headers['Host']}/{repository}/commit/{self.commit}"
            self._answer({"success": True, "commitUrl": address, "commitOid": self.commit})
        elif "paths-info" in parts:
            found = self._find("/".join(parts[2:4]) + "/adapter.safetensors")
            entry = [] if found is None else [{"type": "file", "size": len(found), "path": "adapter.safetensors"}]
            self._answer([one | {"oid": self.commit} for one in entry])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self._give(with_body=False)

    def do_GET(self) -> None:
        self._give(with_body=True)

    def _give(self, *, with_body: bool) -> None:
        repository, _, name = self.path.strip("/").partition(f"/resolve/{'main'}/")
        content = self._find(f"{repository}/{name}")
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _find(self, path: str) -> bytes | None:
        return self.files.get(path)

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve_hub() -> Iterator[tuple[str, type[Hub]]]:
    """Gives its address, and what it holds."""
    kind = type("OwnHub", (Hub,), {"files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
