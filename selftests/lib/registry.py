# SPDX-License-Identifier: GPL-2.0
"""Where images are kept: a registry on the loopback, in memory, with as much of the protocol as `ovbd push` and `ovbd pull`
use; and image layouts, which need no network."""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse

from test_script import run


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    blobs, documents, uploads = {}, {}, {}

    def log_message(self, *_words):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        place = f"{self.path}{len(self.uploads)}"
        self.uploads[place] = bytearray()
        self.answer(202, Location=place)

    def do_PATCH(self):
        upload = self.uploads[self.path]
        upload += self.body()
        self.answer(202, Location=self.path, Range=f"0-{len(upload) - 1}")

    def do_PUT(self):
        body = self.body()
        if "/blobs/uploads/" in self.path:
            body = bytes(self.uploads.pop(self.path.partition("?")[0])) + body
        name = urllib.parse.urlsplit(self.path)
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if "/manifests/" in name.path:
            self.documents[name.path] = self.headers["Content-Type"], body
        elif urllib.parse.parse_qs(name.query)["digest"] == [digest]:
            self.blobs[digest] = body
        else:
            return self.answer(400)
        return self.answer(201)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path in self.documents:
            kind, body = self.documents[self.path]
            return self.answer(200, body, Content_Type=kind)
        if (body := self.blobs.get(self.path.rpartition("/")[2])) is None:
            return self.answer(200 if self.path == "/v2/" else 404)
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(200, body)
        first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        return self.answer(206, body[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}")


def has_network():
    """Whether the kernel has one; the debug kernel does not."""
    try:
        socket.socket(socket.AF_INET).close()
    except OSError:
        return False
    return True


def write_layout(folder, name, layers):
    """Writes an image layout with one image of these files, and returns the digests of its layers."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(kind, content):
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    described = [put("layer.v1.tar", layer.read_bytes()) for layer in layers]
    digests = [layer["digest"] for layer in described]
    config = put("config.v1+json", json.dumps({"rootfs": {"type": "layers", "diff_ids": digests}}).encode())
    manifest = put("manifest.v1+json", json.dumps(
        {"schemaVersion": 2, "config": config, "layers": described}).encode())
    manifest["annotations"] = {"org.opencontainers.image.ref.name": name}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return [digest.partition(":")[2] for digest in digests]


@contextlib.contextmanager
def registry():
    """Its address while the body runs."""
    run("ip", "link", "set", "lo", "up")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
