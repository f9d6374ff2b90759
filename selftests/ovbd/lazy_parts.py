#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd pull --lazy`: where the parts of layers come from, and what is known of them before all are there: lists of chunks, which
the image names or somebody publishes, mirrors, chunks of other images, and traces of what is read first."""

import hashlib
import io
import json
import os
import pathlib
import random
import signal
import struct
import sys
import tarfile
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from lazy_stacks import Readers, differs, done, down, process_of, pull, run_tests, store, ublk_devices, wait_until
from ovbd_command import listed, ovbd, ovbd_fails, refused
from slow_registry import slow_registry
from test_script import OVBD, SCRATCH, Tap, run
from zfile_writer import crc32c

CHUNK = 256 << 10
NAMED = "vnd.dm-overlaybd.chunk-list"


def layers_of(image):
    return [layer["digest"] for layer in json.loads(ovbd("inspect", "--json", image.reference))["layers"]]


def errors_of(name):
    return " ".join(layer["fetch"]["error"] or "" for layer in listed(name)["layers"] if layer["fetch"])


def said(name, image, *options):
    """What a pull says beside the name of the device."""
    command = [str(OVBD), "pull", "--verbose", "--lazy", "--store", store(name), "--up", name, *options, image.reference]
    return run("sh", "-c", '"$@" 2>&1', "sh", *command)


def a_wrong_part_is_never_read(tap, image, how):
    how.delay = 0.0
    digest = layers_of(image)[1]
    how.wrong = {digest: 300 << 10}
    text = said("checked", image, "--io-timeout", "2")
    tap.result("has not been checked" not in text and "published" not in text, "an image that ovbd pushed names its lists", text)
    device = "/dev/mapper/checked"
    with Readers(device, image.bytes) as readers:
        wait_until("a read fails", lambda: readers.errors > 0)
        wait_until("all else is here", lambda: [layer["fetch"] is None for layer in listed("checked")["layers"]] ==
                   [True, False, True])
        time.sleep(0.5)
    tap.equal(readers.wrong, [], f"{readers.errors} reads failed, {readers.reads} were right")
    tap.result("not what the chunk list says" in errors_of("checked"), "ls says why", errors_of("checked"))
    how.wrong = {}
    done("checked")
    tap.equal(differs(device, image.bytes), None, "when the registry sends what it should all of it comes")
    down("checked")


def a_list_may_be_published(tap, image, how):
    """An image that another tool has pushed: no layer names a list."""
    how.delay = 0.0
    manifest = json.loads(ovbd("inspect", "--raw", image.reference))
    for layer in manifest["layers"]:
        del layer["annotations"][NAMED]
    path = "/v2/vm/web/manifests/foreign"
    how.documents[path] = manifest["mediaType"], json.dumps(manifest).encode()
    foreign = image.named(image.reference.replace(":1", ":foreign"))
    text = said("foreign", foreign)
    tap.result("has not been checked" in text, "an image without lists: it is said once", text)
    done("foreign")
    down("foreign")
    how.wrong = {layers_of(image)[0]: 5}
    status, why = ovbd_fails("chunks", "--store", SCRATCH / "none", foreign.reference)
    tap.result(status == 1 and "have the digest" in why, "no list is made of what is not the layer", why)
    how.wrong = {}
    artifact = ovbd("chunks", "--store", SCRATCH / "none", foreign.reference).strip()
    tap.result(artifact.startswith("sha256:"), "ovbd chunks publishes lists", artifact)
    run("rm", "-r", store("foreign"))
    how.wrong = {layers_of(image)[1]: 300 << 10}
    text = said("foreign", foreign, "--io-timeout", "1")
    tap.result("somebody has published" in text, "which is said", text)
    with Readers("/dev/mapper/foreign", image.bytes) as readers:
        wait_until("a read fails", lambda: readers.errors > 0)
    tap.equal(readers.wrong, [], "and no wrong part is read")
    how.wrong = {}
    # Who goes on has the same lists.
    os.kill(process_of("foreign"), 9)
    time.sleep(0.1)
    how.wrong = {layers_of(image)[1]: 300 << 10}
    pull("foreign", foreign, "--io-timeout", "1")
    with Readers("/dev/mapper/foreign", image.bytes) as readers:
        time.sleep(1.5)
    tap.equal(readers.wrong, [], "nor by who goes on after a kill")
    how.wrong = {}
    done("foreign")
    tap.equal(differs("/dev/mapper/foreign", image.bytes), None, "all of it is right then")
    down("foreign")


def a_list_of_something_else_is_refused(tap, image, how):
    how.delay = 0.0
    lists = how.remove_chunk_lists()
    digest, content = max(lists.items(), key=lambda entry: len(entry[1]))
    how.blobs.update(lists)
    how.blobs[digest] = content[:-1] + bytes([content[-1] ^ 1])
    refused(tap, "a list with another digest", "does not have this digest", "pull", "--lazy", "--store", store("other"),
            "--up", "other", image.reference)
    how.blobs.update(lists)


def another_source_is_asked(tap, image, how):
    """The registry sends one part wrong and then nothing more; a mirror has everything."""
    how.delay = 0.0
    with slow_registry() as (host, mirror):
        mirror.blobs.update(how.blobs)
        how.wrong = {layers_of(image)[0]: 1 << 20}
        device = pull("mirrored", image, "--mirror", f"{host}/copy/web", "--limit", "8M")
        with Readers(device, image.bytes) as readers:
            time.sleep(0.5)
            how.status = 500
            done("mirrored")
        how.status, how.wrong = None, {}
    tap.equal((readers.wrong, readers.errors), ([], 0), f"{readers.reads} reads, all right")
    tap.result(mirror.sent > 0, f"the mirror sent {mirror.sent} bytes")
    tap.equal(differs(device, image.bytes), None, "all of it is right then")
    down("mirrored")


def what_is_here_is_not_fetched(tap, image, how):
    """The next version of an image has a layer that was built anew, with few changes."""
    how.delay = 0.0
    raws, layers = [SCRATCH / f"version{number}" for number in (1, 2)], [SCRATCH / f"layer{number}" for number in (1, 2)]
    raws[0].write_bytes(image.bytes)
    raws[1].write_bytes(image.bytes)
    with open(raws[1], "r+b") as file:
        # Where there is data: all that follows keeps its place in the layer.
        full = [at for at in range(0, len(image.bytes), 4096) if any(image.bytes[at:at + 4096])]
        for at in (full[0], full[len(full) // 2], full[-1]):
            file.seek(at)
            file.write(random.Random(at).randbytes(4096))
    references = [image.reference.replace(":1", f":version{number}") for number in (1, 2)]
    for raw, layer, reference in zip(raws, layers, references):
        ovbd("build", "--format", "lsmt", "-o", layer, raw)
        ovbd("push", layer, reference)
    pull("versions", image.named(references[0]))
    done("versions")
    down("versions")
    how.sent = 0
    device = pull("versions", image.named(references[1]))
    done("versions")
    size = layers[1].stat().st_size
    tap.result(how.sent < size // 5, f"of {size} bytes {how.sent} were fetched, the others copied")
    tap.equal(differs(device, raws[1].read_bytes()), None, "all of it is right")
    down("versions")
    # What is copied must be what the list says, too.
    ovbd("rmi", "--store", store("versions"), references[1])
    ovbd("gc", "--store", store("versions"), "--older", "0s")
    first = json.loads(ovbd("inspect", "--json", references[0]))["layers"][0]["digest"].partition(":")[2]
    with open(store("versions") / "blobs/sha256" / first, "r+b") as file:
        file.seek(8 << 20)
        file.write(b"damaged")
    device = pull("versions", image.named(references[1]))
    done("versions")
    tap.equal(differs(device, raws[1].read_bytes()), None, "damaged chunks of other layers are not taken")
    down("versions")


def a_trace_is_fetched_first(tap, image, how):
    how.delay = 0.0
    places = random.Random("trace").sample(range(0, len(image.bytes), 1 << 20), 6)
    device = pull("traced", image, "--trace", "4")
    for at in places:
        read_direct(device, at, 4096)

    wait_until("the trace is there", lambda: pathlib.Path("/run/ovbd/traced.trace").exists())
    time.sleep(1.2)
    tap.equal(len(ublk_devices()), 1, "nothing is handed over while it is noted what is read")
    trace = json.loads(ovbd("trace", "traced"))
    done("traced")
    tap.equal(json.loads(ovbd("trace", "traced"))["reads"][:len(trace["reads"])], trace["reads"], "the trace stays")
    tap.equal(trace["layers"], layers_of(image), "it names the layers")
    artifact = ovbd("trace", "--push", image.reference, "traced").strip()
    tap.result(artifact.startswith("sha256:"), "it is published", artifact)
    status, why = ovbd_fails("trace", "--push", image.reference.replace(":1", ":version1"), "traced")
    tap.result(status == 1 and "has other layers" in why, "but not for another image", why)
    down("traced")
    run("rm", "-r", store("traced"))
    how.delay, how.asked = 0.05, []
    pull("traced", image, "--jobs", "2")
    wanted = {(trace["layers"][layer], (first + more) * CHUNK) for layer, first, count in trace["reads"]
              for more in range(count)}
    blobs = set(trace["layers"])

    def early():
        """What was asked for of the layers until all that the trace has was."""
        found, seen = [], set()
        for digest, first in [entry for entry in how.asked if entry[0] in blobs]:
            found.append((digest, first))
            seen.add((digest, first // CHUNK * CHUNK))
        return found

    done("traced")
    count = max(early().index(entry) for entry in early() if (entry[0], entry[1] // CHUNK * CHUNK) in wanted)
    total = len(early())
    tap.result(count < len(wanted) + 12, f"what the trace has is among the first {count + 1} of {total} requests", early()[:40])
    tap.equal(differs(device, image.bytes), None, "all of it is right")
    down("traced")
    run("rm", "-r", store("traced"))
    how.asked = []
    pull("traced", image, "--prefetch")
    asked = {(digest, first // CHUNK * CHUNK) for digest, first in how.asked}
    # One request may have several.
    starts = {(trace["layers"][layer], first * CHUNK) for layer, first, _ in trace["reads"]}
    tap.result(len(starts - asked) <= len(starts) // 2 and len(how.asked) >= len(starts) // 2,
               f"with --prefetch the device is there after what the trace has: {len(how.asked)} requests")
    done("traced")
    down("traced")


def an_acceleration_layer_is_followed(tap, image, how):
    """The original's record of reads: one in the middle of the lowest layer."""
    how.delay = 0.0
    manifest = json.loads(ovbd("inspect", "--raw", image.reference))
    config = json.loads(how.blobs[manifest["config"]["digest"]])
    base = manifest["layers"][0]
    place = len(image.bytes) // 8
    records = struct.pack("<BxxxIQQ", ord("R"), 0, 4096, place) + struct.pack("<BxxxIQQ", ord("R"), 7, 1 << 63, 1 << 63)
    trace = struct.pack("<IxxxxQIxxxx", 3270449184, len(records), crc32c(0, records)) + records
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("trace")
        member.size = len(trace)
        archive.addfile(member, io.BytesIO(trace))

    def put(content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        how.blobs[digest] = content
        return {"digest": digest, "size": len(content)}

    layer = put(tar.getvalue())
    config["rootfs"]["diff_ids"].append(layer["digest"])
    manifest["layers"].append(layer | {"mediaType": "application/vnd.oci.image.layer.v1.tar", "annotations": {
        "containerd.io/snapshot/overlaybd/acceleration-layer": "yes",
        "containerd.io/snapshot/overlaybd/blob-digest": layer["digest"],
        "containerd.io/snapshot/overlaybd/blob-size": str(layer["size"])}})
    manifest["config"] |= put(json.dumps(config).encode())
    how.documents["/v2/vm/web/manifests/accelerated"] = manifest["mediaType"], json.dumps(manifest).encode()
    how.delay, how.asked = 0.05, []
    pull("accelerated", image.named(image.reference.replace(":1", ":accelerated")), "--prefetch", "--jobs", "1")
    count = -(-base["size"] // CHUNK)
    asked = [first // CHUNK for digest, first in how.asked if digest == base["digest"]]
    inside = [chunk for chunk in asked if 3 < chunk < count - 3]
    tap.result(inside and 1 not in asked[:asked.index(inside[0])], "what the record has is fetched before the rest", asked[:10])
    done("accelerated")
    tap.equal(differs("/dev/mapper/accelerated", image.bytes), None, "all of it is right")
    down("accelerated")


def tokens_and_addresses_expire(tap, image, how):
    how.delay, how.lifetime = 0.0, 0.1
    device = pull("expiring", image, "--limit", "4M", "--jobs", "2")
    with Readers(device, image.bytes) as readers:
        done("expiring")
    expired, how.lifetime = how.expired, None
    tap.equal((readers.wrong, readers.errors), ([], 0), f"{readers.reads} reads while tokens and addresses expire")
    tap.result(expired["tokens"] > 2 and expired["addresses"] > 2, "they did", expired)
    tap.equal(differs(device, image.bytes), None, "all of it is there then")
    down("expiring")


def may_be_called_up(tap, image, how):
    how.delay = 0.0
    device = ovbd("up", "--lazy", "--store", store("up"), "--writable", "up", image.reference).strip()
    done("up")
    tap.equal(differs(device, image.bytes), None, "ovbd up --lazy")
    tap.equal(run("dmsetup", "table", "up").split()[2], "linear", "and writable: over a store")
    down("up")


def its_store_is_elsewhere(tap, image, how):
    """The store of a stack whose process was killed is on the stack itself."""
    how.delay, folder = 0.0, SCRATCH / "mounted"
    device = pull("own", image, "--writable", "--limit", "2M", "--jobs", "2")
    run("mkfs.ext4", "-q", "-F", device)
    folder.mkdir()
    run("mount", device, folder)
    (folder / "ingest").mkdir()
    (folder / "ingest/lazy-own.json").write_bytes((store("own") / "ingest/lazy-own.json").read_bytes())
    os.kill(process_of("own"), signal.SIGKILL)
    wait_until("nobody serves it", lambda: listed("own")["layers"][0]["fetch"]["state"] == "waiting")
    refused(tap, "a store on the stack itself", "it would wait for itself", "pull", "--lazy", "--store", folder, "--up", "own",
            image.reference)
    pull("own", image)
    done("own")
    run("umount", folder)
    down("own")


def without_ublk(tap, image, how):
    control = pathlib.Path("/dev/ublk-control")
    aside = control.with_name("ublk-control-aside")
    control.rename(aside)
    try:
        refused(tap, "a kernel without ublk", "pull without --lazy", "pull", "--lazy", "--store", store("none"), "--up", "none",
                image.reference)
    finally:
        aside.rename(control)


tap = Tap()
run_tests(tap, (a_wrong_part_is_never_read, a_list_may_be_published, a_list_of_something_else_is_refused, another_source_is_asked,
                what_is_here_is_not_fetched, a_trace_is_fetched_first, an_acceleration_layer_is_followed, tokens_and_addresses_expire,
                may_be_called_up, its_store_is_elsewhere, without_ublk))
tap.finish()
