# SPDX-License-Identifier: GPL-2.0
"""Debian's docker-registry on the loopback, for the demo, the benchmark of registries and the tests of logical volumes."""

import contextlib
import pathlib
import socket
import subprocess
import time

CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/data}}}}
http: {{addr: '127.0.0.1:{port}', secret: none}}
"""


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, port):
    """Starts one that keeps what it gets in `folder`, and waits until it answers; returns its process."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    config.write_text(CONFIG.format(folder=folder, port=port))
    server = subprocess.Popen(["docker-registry", "serve", config], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    for _ in range(1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        if server.poll() is not None:
            break
        time.sleep(0.02)
    stop(server)
    raise OSError("docker-registry does not start")


def stop(server):
    """Ends one, whatever it is doing."""
    server.kill()
    server.wait()


@contextlib.contextmanager
def docker_registry(folder):
    """Its port while the body runs."""
    port = free_port()
    server = start(folder, port)
    try:
        yield port
    finally:
        stop(server)
