# SPDX-License-Identifier: GPL-2.0
"""A registry on the loopback that is slow, silent, wrong or gone when a test wants it to be, and counts what it sends."""

import contextlib
import http.server
import threading
import time

import registry
from test_script import run


class Behaviour:
    """How the registry is at the moment."""

    def __init__(self):
        self.delay = 0.0
        self.silent = threading.Event()
        self.status = None
        self.ranges = True
        # Byte of a blob, by its digest, that is sent wrong.
        self.wrong = {}
        self.sent = 0
        # Bytes in a second, None for as many as there can be.
        self.rate = None
        # Digests and first bytes of the parts that were asked for.
        self.asked = []
        self.blobs, self.documents = {}, {}
        self.lock = threading.Lock()

    def remove_chunk_lists(self):
        """Loses the lists of chunks, as a registry does to which nothing refers; returns them."""
        lists = {digest: blob for digest, blob in self.blobs.items() if blob.startswith(b"ovbdchk")}
        for digest in lists:
            del self.blobs[digest]
        return lists

    def take_turn(self, count):
        """Waits for as long as `count` bytes take on the line, which all answers share."""
        if self.rate is None:
            return
        with self.lock:
            self.line = max(getattr(self, "line", 0.0), time.monotonic()) + count / self.rate
            until = self.line
        time.sleep(max(0.0, until - time.monotonic()))


class Handler(registry.Handler):
    """Blobs by ranges, as `Behaviour` has it."""

    behaviour = None

    def do_GET(self):
        digest = self.path.rpartition("/")[2]
        how = self.behaviour
        if self.path in self.documents or digest not in self.blobs:
            return super().do_GET()
        # Nothing comes until the test says so, and then the connection ends.
        while how.silent.is_set():
            time.sleep(0.05)
        time.sleep(how.delay)
        if how.status:
            return self.answer(how.status)
        if not how.ranges:
            del self.headers["Range"]
        return super().do_GET()

    def answer(self, status, body=b"", **headers):
        digest, how = self.path.rpartition("/")[2], self.behaviour
        if self.command == "GET" and digest in self.blobs:
            first = int(headers["Content_Range"].split()[1].partition("-")[0]) if status == 206 else 0
            at = how.wrong.get(digest, -1) - first
            if 0 <= at < len(body):
                body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1:]
            with how.lock:
                how.sent += len(body)
                how.asked.append((digest, first))
            how.take_turn(len(body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().answer(status, body, **headers)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, _request, _address):
        """Clients that are killed are meant to be."""


@contextlib.contextmanager
def slow_registry():
    """Its address and its behaviour while the body runs."""
    run("ip", "link", "set", "lo", "up")
    behaviour = Behaviour()
    handler = type("SlowHandler", (Handler,), {"behaviour": behaviour, "blobs": behaviour.blobs, "documents": behaviour.documents, "uploads": {}})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", behaviour
    finally:
        behaviour.silent.clear()
        server.shutdown()
        server.server_close()
