#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Signed images of a registry that nobody trusts: /etc/ovbd/policy.conf says whose signature counts, `ovbd pull` and
`ovbd up` obey it, and what the registry changed is refused or an error to read, never other content."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct, sha256
from ovbd_command import MIB, existing, listed, ovbd, refused, settled
from registry import Handler, registry
from sealed_stacks import BLOCK, make_key
from test_script import SCRATCH, Tap, load

SIZE = 3 * MIB
DEVICE = pathlib.Path("/dev/mapper/checked")
POLICY = pathlib.Path("/etc/ovbd/policy.conf")
ROOT, SIGNATURE = "vnd.dm-overlaybd.verity.root", "vnd.dm-overlaybd.verity.signature"


@contextlib.contextmanager
def policy(text):
    """The policy while the body runs."""
    POLICY.parent.mkdir(exist_ok=True)
    POLICY.write_text(text)
    try:
        yield
    finally:
        POLICY.unlink()


def manifest(repository, tag):
    """A manifest as the registry has it."""
    return json.loads(Handler.documents[f"/v2/{repository}/manifests/{tag}"][1])


def replace(repository, tag, changed):
    """Has the registry send another manifest."""
    path = f"/v2/{repository}/manifests/{tag}"
    Handler.documents[path] = Handler.documents[path][0], json.dumps(changed).encode()


def use(tap, image, what, *words):
    """Brings up an image and compares it."""
    ovbd("up", *words, "checked", image)
    tap.equal(sha256(DEVICE), sha256(SCRATCH / "raw"), what)
    state = listed("checked")["verity"]
    ovbd("down", "checked")
    return state


def signed(tap, host, base, sign):
    """Pushed with a signature, pulled by a machine that insists on it."""
    image = f"{host}/vm/web:mon"
    ovbd("push", "--seal", *sign, base, image)
    with policy(f"# whose\n{host}/vm {sign[-1]}\n* reject\n"):
        ovbd("pull", "--up", "checked", image)
        tap.equal(sha256(DEVICE), sha256(SCRATCH / "raw"), "pulled and mapped at once: the image")
        root = listed("checked")["verity"]["root"]
        said = manifest("vm/web", "mon")["annotations"][ROOT]
        tap.equal(root, f"{said}:{SIZE}", "with the root hash of the manifest")
        ovbd("down", "checked")
        state = use(tap, image, "mapped by name: the image")
        tap.result(state is not None, "and checked, though nothing on the command line says so")
        refused(tap, "with another layer on top", "a seal is of that image alone", "up", "checked", image, base)
        refused(tap, "into a thin volume", "is not checked against the root hash", "pull", "--thin", "vg/pool", image)
        refused(tap, "an ordinary image", "has no root hash", "pull", "--convert", image)
        refused(tap, "another repository", "rejects images of this repository", "pull", f"{host}/other/web:mon")
    with policy("nonsense\n"):
        refused(tap, "a policy that is not understood", f"{POLICY}: line 1:", "up", "checked", image)


def without_policy(tap, host, image, certificate, other):
    """The root hash of the image is believed where the user says why."""
    up = ["up", "--verity", "image"]
    refused(tap, "the root hash is in the image alone", "name the image by its digest", *up, "checked", image)
    refused(tap, "signed by another", "none of the certificates fits", *up, "--certificate", other, "checked", image)
    use(tap, image, "the user names who signed it", "--verity", "image", "--certificate", certificate)
    body = Handler.documents["/v2/vm/web/manifests/mon"][1]
    digest = f"{host}/vm/web@sha256:{hashlib.sha256(body).hexdigest()}"
    documents = Handler.documents
    documents[f"/v2/vm/web/manifests/{digest.partition('@')[2]}"] = documents["/v2/vm/web/manifests/mon"]
    ovbd("pull", digest)
    use(tap, digest, "the user names the image by its digest", "--verity", "image")


def push_again(tap, host, image, sign):
    """What was written to a stack that is checked, sealed by the root hash that it is checked against."""
    written, new = SCRATCH / "written.zfile", f"{host}/vm/web:new"
    with policy(f"{host}/vm {sign[-1]}\n"):
        ovbd("up", "--writable", "checked", image)
        with open(DEVICE, "r+b", buffering=0) as device:
            device.seek(100 * BLOCK)
            device.write(bytes(BLOCK))
            os.fsync(device.fileno())
        digest = sha256(DEVICE)
        ovbd("push", "--seal", *sign, "--layer", written, "checked", new)
        ovbd("down", "checked")
        ovbd("pull", "--up", "checked", new)
        tap.equal(sha256(DEVICE), digest, "what was written, pulled from the registry")
        tap.result(listed("checked")["verity"] is not None, "and checked")
        ovbd("down", "checked")


def sign_later(tap, host, base, sign):
    """Pushed without a signature, and signed by who has the key and a copy."""
    image = f"{host}/vm/web:later"
    ovbd("push", "--seal", base, image)
    rule = f"{host}/vm {sign[-1]}\n"
    with policy(rule):
        refused(tap, "no signature", "has no signature", "pull", image)
    ovbd("pull", image)
    ovbd("sign", *sign, image)
    ovbd("push", image, image)
    with policy(rule):
        ovbd("pull", image)
        use(tap, image, "signed later")


def changed_by_the_registry(tap, host, base, sign, unknown):
    """All that it can send."""
    rule = f"{host}/vm {sign[-1]}\n"
    good = manifest("vm/web", "mon")
    image = f"{host}/vm/web:bad"
    ovbd("push", base, image)
    with policy(rule):
        refused(tap, "an image without a seal", "has no root hash", "pull", image)
    ovbd("push", "--seal", *unknown, base, image)
    with policy(rule):
        refused(tap, "a signature of an unknown key", "none of the certificates fits", "pull", image)
    bad = manifest("vm/web", "bad")
    other = f"{int(bad['annotations'][ROOT][0], 16) ^ 1:x}{bad['annotations'][ROOT][1:]}"
    bad["annotations"] |= {ROOT: other, SIGNATURE: good["annotations"][SIGNATURE]}
    replace("vm/web", "bad", bad)
    with policy(rule):
        refused(tap, "the signature of another root hash", "none of the certificates fits", "pull", image)

    # A valid layer in the place of another, with its UUID: its content differs in one block.
    raw = SCRATCH / "raw"
    changed = bytearray(raw.read_bytes())
    changed[300 * BLOCK + 5] ^= 1
    (SCRATCH / "swapped").write_bytes(changed)
    uuid = json.loads(ovbd("info", "--json", base))["layers"][0]["uuid"]
    swapped = SCRATCH / "swapped.layer"
    ovbd("build", "--uuid", uuid, "-o", swapped, SCRATCH / "swapped")
    ovbd("push", swapped, image)
    swapped = manifest("vm/web", "bad")
    config = json.loads(Handler.blobs[good["config"]["digest"]])
    config["rootfs"]["diff_ids"][0] = swapped["layers"][0]["digest"]
    body = json.dumps(config).encode()
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    Handler.blobs[digest] = body
    mixed = good | {"layers": [swapped["layers"][0], good["layers"][1]],
                    "config": good["config"] | {"digest": digest, "size": len(body)}}
    replace("vm/web", "bad", mixed)
    with policy(rule):
        ovbd("pull", "--up", "checked", image)
        wrong, failed = [], []
        content = raw.read_bytes()
        for block in range(SIZE // BLOCK):
            try:
                if read_direct(DEVICE, block * BLOCK, BLOCK) != content[block * BLOCK:][:BLOCK]:
                    wrong.append(block)
            except OSError:
                failed.append(block)
        tap.equal((wrong, failed), ([], [300]), "a layer that was swapped: an error where it differs, and nothing else")
        ovbd("down", "checked")
        mixed["layers"].reverse()
        replace("vm/web", "bad", mixed)
        refused(tap, "layers in another order", "", "pull", "--up", "checked", image)


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile", "dm-verity")
    before = existing()
    raw, base = SCRATCH / "raw", SCRATCH / "base.zfile"
    raw.write_bytes(random.Random("policy").randbytes(SIZE))
    ovbd("build", "-o", base, raw)
    sign, unknown = ([f"--sign-key={key}", "--certificate", certificate]
                     for key, certificate in (make_key("trusted"), make_key("unknown")))
    with registry() as host:
        signed(tap, host, base, sign)
        without_policy(tap, host, f"{host}/vm/web:mon", sign[-1], unknown[-1])
        push_again(tap, host, f"{host}/vm/web:mon", sign)
        sign_later(tap, host, base, sign)
        changed_by_the_registry(tap, host, base, sign, unknown)
    tap.equal(settled(before), before, "no device is left")


tap = Tap()
main(tap)
tap.finish()
