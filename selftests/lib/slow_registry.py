# SPDX-License-Identifier: GPL-2.0
"""A registry on the loopback that is slow, silent, wrong or gone when a test wants it to be, and counts what it sends."""

import contextlib
import http.server
import json
import socket
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
        # Seconds that a token is good for, None where none is wanted. With one, blobs are where a signed address says that is
        # good for as long, and every third has expired on the way.
        self.lifetime = None
        self.expired = {"tokens": 0, "addresses": 0}
        self.addresses = 0
        # Byte of a blob, by its digest, that is sent wrong.
        self.wrong = {}
        self.sent = 0
        # Bytes in a second, None for as many as there can be.
        self.rate = None
        # Digests and first bytes of the parts that were asked for.
        self.asked = []
        self.blobs, self.documents = {}, {}
        self.lock = threading.Lock()
        self.connections = set()

    def cut_connections(self):
        """Ends all connections, those in the middle of an answer too."""
        for connection in self.connections.copy():
            # Others end by themselves meanwhile.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def remove_chunk_lists(self):
        """Loses the lists of chunks, as a registry does to which nothing refers; returns them."""
        lists = {digest: blob for digest, blob in self.blobs.items() if blob.startswith(b"ovbdchk")}
        for digest in lists:
            del self.blobs[digest]
        return lists

    def issue(self, age=0.0):
        """A token, or the signature of an address, that is so many seconds old."""
        return f"{time.monotonic() - age:.6f}"

    def is_good(self, issued, what):
        """Whether one has not expired; counts those that have."""
        if issued and time.monotonic() - float(issued) < self.lifetime:
            return True
        self.expired[what] += bool(issued)
        return False

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

    def setup(self):
        super().setup()
        self.behaviour.connections.add(self.connection)

    def finish(self):
        self.behaviour.connections.discard(self.connection)
        # What could not be sent on a connection that was cut.
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self):
        how = self.behaviour
        self.path, _, query = self.path.partition("?")
        if self.path == "/token":
            return self.answer(200, json.dumps({"token": how.issue()}).encode(), Content_Type="application/json")
        digest = self.path.rpartition("/")[2]
        if how.lifetime is not None and digest in self.blobs and not self.is_let_in(query):
            return None
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

    def is_let_in(self, signature):
        """Whether a signed address is good; answers where it is not, or where there is none."""
        how = self.behaviour
        if signature:
            if how.is_good(signature, "addresses"):
                return True
            self.answer(403)
            return False
        if not how.is_good(self.headers.get("Authorization", "").removeprefix("Bearer "), "tokens"):
            self.answer(401, WWW_Authenticate=f'Bearer realm="http://{self.headers["Host"]}/token",service="here"')
            return False
        how.addresses += 1
        age = how.lifetime if how.addresses % 3 == 0 else 0.0
        port = self.server.server_port
        # A server for blobs alone, as far as anybody can see.
        self.answer(307, Location=f"http://127.0.0.2:{port}{self.path}?{how.issue(age)}")
        return False

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
    server = Server(("", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", behaviour
    finally:
        behaviour.silent.clear()
        server.shutdown()
        server.server_close()
