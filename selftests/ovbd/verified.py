#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd up --verity`: what is read is what the root hash says or an error, read-only and below what is written; the
kernel checks signatures of the root where it is told to or where it insists."""

import os
import pathlib
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import sha256
from ovbd_command import MIB, leaves_nothing, listed, ovbd, ovbd_fails, refused
from sealed_stacks import BLOCK, failed_blocks, flip, make_key
from test_script import SCRATCH, Tap, load, run

SIZE = 5 * MIB
DEVICE = pathlib.Path("/dev/mapper/checked")
# A block of the image, which is not in the first window that is read.
CHANGED = 700
SYSTEMD = "/usr/lib/systemd/systemd-veritysetup"


def sign(root, name):
    """A new key with its certificate, and the signature of a root hash; returns the files."""
    key, certificate = make_key(name)
    signature = SCRATCH / f"{name}.p7s"
    run("openssl", "smime", "-sign", "-noattr", "-binary", "-nocerts", "-in", root, "-inkey", key,
        "-signer", certificate, "-outform", "der", "-out", signature)
    return certificate, signature


def trust(certificate):
    """Has dm-verity trust a certificate: in its own keyring, which counts once it can have no more keys."""
    der = SCRATCH / "certificate.der"
    run("openssl", "x509", "-in", certificate, "-outform", "der", "-out", der)
    with open(der, "rb") as file:
        run("keyctl", "padd", "asymmetric", "", "%:.dm-verity", stdin=file)
    run("keyctl", "restrict_keyring", "%:.dm-verity")


def read_only(tap, root, layers, image):
    ovbd("up", "--verity", root, "checked", *layers)
    tap.equal(sha256(DEVICE), sha256(image), "what is read is the image, without the tree")
    digest = root.read_text()
    tap.equal(listed("checked")["verity"], {"root": f"{digest}:{SIZE}", "state": "verified", "signed": False},
              "ovbd ls: what it is checked against")
    tap.equal(len(listed("checked")["layers"]), len(layers), "ovbd ls: its layers")
    tap.result(f"  verified: {digest}:{SIZE}\n" in ovbd("ls"), "ovbd ls says it to people too")
    ovbd("down", "checked")
    script = ovbd("up", "--dry-run", "--verity", digest, "checked", *layers)
    run("sh", "-e", input=script)
    tap.equal(sha256(DEVICE), sha256(image), "the commands that are printed do the same")
    ovbd("down", "checked")


def refusals(tap, root, layers, other):
    digest = root.read_text()
    wrong = f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"
    up = ["up", "--verity"]
    refused(tap, "another root", "the root of the hash tree is another", *up, wrong, "checked", *layers)
    refused(tap, "no seal", "the stack is not sealed", *up, digest, "checked", layers[0])
    refused(tap, "another size", f"no superblock of dm-verity at byte {SIZE - BLOCK}", *up, f"{digest}:{SIZE - BLOCK}",
            "checked", *layers)
    refused(tap, "the seal of another stack", "the root of the hash tree is another", *up, digest, "checked",
            "--ignore-parents", layers[0], other)
    refused(tap, "no root hash", "no such file, and not a root hash", *up, "0123", "checked", *layers)
    empty = SCRATCH / "empty"
    empty.write_bytes(b"")
    refused(tap, "an empty file", "0 bytes are not a root hash", *up, empty, "checked", *layers)
    status, said = ovbd_fails("up", "--signature", root, "checked", *layers)
    tap.result(status == 2 and "--verity" in said, "a signature of no root")


def damage(tap, root, layers):
    """Each block that was touched is an error, and nothing else."""
    # Behind the header of the layer.
    place = (1 + CHANGED) * BLOCK + 7
    flip(layers[0], place)
    ovbd("up", "--verity", root, "checked", *layers)
    tap.equal(failed_blocks(DEVICE, SIZE), [CHANGED], "a changed byte is an error for its block alone")
    tap.equal(listed("checked")["verity"]["state"], "corrupted", "ovbd ls: something was not what was sealed")
    ovbd("down", "checked")
    flip(layers[0], place)


def writable(tap, root, layers, image):
    cow, out = SCRATCH / "checked.cow", SCRATCH / "written.zfile"
    ovbd("up", "--writable", "--cow", cow, "--verity", root, "checked", *layers)
    tap.equal(sha256(DEVICE), sha256(image), "writable: what is read is the image")
    with open(DEVICE, "r+b", buffering=0) as device:
        device.seek(3 * BLOCK + 512)
        device.write(b"written" + bytes(505))
        os.fsync(device.fileno())
    tap.equal(listed("checked")["verity"]["state"], "verified", "ovbd ls: below what is written")
    status, said = ovbd_fails("commit", "checked", "-o", out)
    warned = "is not sealed, so the stack is not put on it" in said
    tap.result(status == 0 and warned, "commit says that it does not seal")
    changed = bytearray(image.read_bytes())
    changed[3 * BLOCK + 512:3 * BLOCK + 1024] = b"written" + bytes(505)
    new = SCRATCH / "changed"
    new.write_bytes(changed)
    tap.equal(sha256(DEVICE), sha256(new), "the device has what was written")
    ovbd("down", "checked")
    ovbd("up", "--writable", "--cow", cow, "--verity", root, "checked", *layers)
    tap.equal(sha256(DEVICE), sha256(new), "and has it when it is up again")
    ovbd("down", "checked")

    again = SCRATCH / "again.zfile"
    ovbd("seal", "--old-root", root, "-o", again, *layers, out)
    layers = [*layers, out, again]
    ovbd("up", "--verity", SCRATCH / "again.zfile.roothash", "checked", *layers)
    tap.equal(sha256(DEVICE), sha256(new), "sealed again with what was committed")
    ovbd("down", "checked")


def signatures(tap, root, layers, image):
    certificate, signature = sign(root, "trusted")
    other = SCRATCH / "other.roothash"
    other.write_text("0" * 64)
    wrong = sign(other, "wrong")[1]
    unknown = sign(root, "unknown")[1]
    up = ["up", "--verity", root, "--signature"]
    for insists in (False, True):
        run("modprobe", "-r", "dm-verity")
        run("modprobe", "dm-verity", "keyring_unsealed=1", f"require_signatures={int(insists)}")
        kind = "the kernel insists" if insists else "it is asked to"
        rejected = "the kernel does not accept the signature"
        refused(tap, f"{kind}: no key is trusted", rejected, *up, signature, "checked", *layers)
        trust(certificate)
        ovbd(*up, signature, "checked", *layers)
        tap.equal(sha256(DEVICE), sha256(image), f"{kind}: signed, and the image")
        tap.result(listed("checked")["verity"]["signed"], f"{kind}: ovbd ls says that it is signed")
        ovbd("down", "checked")
        for name, bad in (("of another root", wrong), ("by an unknown key", unknown), ("that is none", root)):
            refused(tap, f"{kind}: a signature {name}", rejected, *up, bad, "checked", *layers)
        if insists:
            refused(tap, f"{kind}: no signature", "the kernel demands a signature", *up[:3], "checked", *layers)
            script = ovbd("up", "--dry-run", *up[1:], signature, "checked", *layers)
            run("keyctl", "session", "-", "sh", "-ec", script)
            tap.equal(sha256(DEVICE), sha256(image), f"{kind}: the commands that are printed give the signature")
            ovbd("down", "checked")
    run("modprobe", "-r", "dm-verity")
    load("dm-verity")


def by_systemd(tap, root, layers, image):
    """systemd-veritysetup over what `ovbd up` gives without --verity."""
    if not os.path.exists(SYSTEMD):
        tap.skip("systemd-veritysetup takes the seal", "no package systemd-cryptsetup")
        return
    ovbd("up", "sealed", *layers)
    below = "/dev/mapper/sealed"
    run(SYSTEMD, "attach", "checked", below, below, root.read_text(), f"hash-offset={SIZE}")
    tap.equal(sha256(DEVICE), sha256(image), "systemd-veritysetup takes the seal")
    run(SYSTEMD, "detach", "checked")
    ovbd("down", "sealed")


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile", "dm-verity")
    raw, base, seal = SCRATCH / "raw", SCRATCH / "base.layer", SCRATCH / "seal.zfile"
    raw.write_bytes(random.Random("verified").randbytes(SIZE))
    # Without checksums of its own.
    ovbd("build", "--format", "lsmt", "-o", base, raw)
    ovbd("seal", "-o", seal, base)
    root = SCRATCH / "seal.zfile.roothash"
    layers = [base, seal]
    second, other = SCRATCH / "second.layer", SCRATCH / "other.zfile"
    changed = bytearray(raw.read_bytes())
    changed[:7] = b"another"
    (SCRATCH / "second").write_bytes(changed)
    ovbd("build", "-o", second, SCRATCH / "second")
    ovbd("seal", "-o", other, second)
    leaves_nothing(tap, "read-only", read_only, tap, root, layers, raw)
    refusals(tap, root, layers, other)
    leaves_nothing(tap, "damage", damage, tap, root, layers)
    leaves_nothing(tap, "systemd", by_systemd, tap, root, layers, raw)
    leaves_nothing(tap, "writable", writable, tap, root, layers, raw)
    leaves_nothing(tap, "signatures", signatures, tap, root, layers, raw)


tap = Tap()
main(tap)
tap.finish()
