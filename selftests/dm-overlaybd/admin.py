#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What an administrator sees: the module is loaded by the target's name and stays while it is used; table, status,
IMA and version are as documented; the message `lookup` says where a sector comes from; and layers can be shared by
devices and repeated in one."""

import errno
import hashlib
import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct, stack_table
from module_life import check_autoload, versions
from test_script import Tap, load, run

SECTORS = 4096


def check_status(tap, mapped, table, stack, model):
    reported = mapped.status(dm_ioctl.TABLE)
    numbers = [f"{os.major(number)}:{os.minor(number)}"
               for number in (os.stat(word).st_rdev for word in table.split() if word.startswith("/dev/"))]
    wanted = table
    for path, number in zip([word for word in table.split() if word.startswith("/dev/")], numbers):
        wanted = wanted.replace(path + " ", number + " ")
    tap.equal(reported, wanted, "table: the parameters, with device numbers")
    with dm_ioctl.Mapped("again", reported) as again:
        tap.equal(again.status(dm_ioctl.TABLE), reported, "table: reloads verbatim")

    fields = [int(word) for word in mapped.status().split()[3:]]
    owned = [sum(source[0] == number for source in model.source) for number in range(len(stack))]
    # Runs of one source that are not longer than a segment can be are one segment each after the merge.
    segments, sector = 0, 0
    while sector < SECTORS:
        segments += model.source[sector] != lsmt_writer.HOLE
        sector += model.run(sector)
    tap.equal(fields[:3], [len(stack), segments, sum(owned)], "status: layers, segments and mapped sectors")
    tap.equal(fields[4:], owned, "status: sectors of each layer")
    tap.result(16 * segments <= fields[3] <= 22 * segments + 16, "status: bytes of memory", f"{fields[3]} bytes")


def digest(table, uuids):
    """The digest of the layers in a table as it is documented."""
    words = iter(table.split()[4:])
    lines = [f"{device} {size} {uuid or '-'}\n" for (device, size), uuid in zip(zip(words, words), uuids)]
    return hashlib.blake2s("".join(lines).encode()).hexdigest()


def measured(line, uuids):
    """The digest of the layers as the kernel measures it; the rest of the measurement must be right."""
    with dm_ioctl.Mapped("measured", line) as mapped:
        text = mapped.status(dm_ioctl.IMA).split(" ", 3)[3]
        wanted = (f"target_name=overlaybd,target_version=1.1.0,layers={len(uuids)},virtual_sectors={SECTORS},"
                  f"layers_digest=blake2s-256:{digest(mapped.status(dm_ioctl.TABLE), uuids)};")
        assert text == wanted, f"{text}, wanted {wanted}"
        return text


def check_measurement(tap, devices):
    """Stacks of 100 layers that differ in one thing each."""
    uuids = ["12345678-9abc-def0-1234-56789abcdef0", "12345678-9abc-def0-1234-56789abcdef1", ""]
    segments = [(0, 8, bytes(4096))]
    blobs = [lsmt_writer.layer(segments, SECTORS, uuid) for uuid in uuids]
    devices_of = [stack_table(devices, [blob], SECTORS).split()[4:] for blob in blobs]
    stacks = {
        "all the same": [0] * 100,
        "another UUID at the top": [0] * 99 + [1],
        "no UUID at the top": [0] * 99 + [2],
        "another UUID at the bottom": [1] + [0] * 99,
        "one layer fewer": [0] * 99,
    }
    texts = set()
    for what, numbers in stacks.items():
        line = f"0 {SECTORS} overlaybd {len(numbers)} " + " ".join(" ".join(devices_of[number]) for number in numbers)
        tap.attempt(f"IMA of 100 layers, {what}", lambda: texts.add(measured(line, [uuids[n] for n in numbers])))
    tap.equal(len(texts), len(stacks), "IMA: no two of these are the same")
    # The same layers on one more device.
    other = stack_table(devices, [blobs[0]], SECTORS).split()[4:]
    line = f"0 {SECTORS} overlaybd 100 " + " ".join([" ".join(devices_of[0])] * 99 + [" ".join(other)])
    tap.result(measured(line, [uuids[0]] * 100) not in texts, "IMA: the same layer on another device is another")


def check_lookup(tap, mapped, model, numbers):
    wrong = []
    for sector in range(SECTORS):
        number, place = model.source[sector]
        if number is not None:
            wanted = f"{number} {numbers[number]} {place} {model.run(sector)}"
        else:
            wanted = "hole" if (number, place) == lsmt_writer.HOLE else "zero"
        if (got := mapped.message(f"lookup {sector}")) != wanted:
            wrong.append(f"sector {sector}: {got}, wanted {wanted}")
    tap.result(not wrong, f"lookup: all {SECTORS} sectors", "\n".join(wrong[:10]))
    answers = {"hole" if source == lsmt_writer.HOLE else "zero" if source[0] is None else "data"
               for source in model.source}
    tap.equal(answers, {"data", "hole", "zero"}, "lookup: all three answers occurred")
    for text, wanted in [(f"lookup {SECTORS}", errno.ERANGE), (f"lookup {(1 << 64) - 1}", errno.ERANGE),
                         (f"lookup {1 << 64}", errno.EINVAL), ("lookup", errno.EINVAL), ("lookup -1", errno.EINVAL),
                         ("lookup 0x1", errno.EINVAL), ("lookup 1 2", errno.EINVAL), ("look 1", errno.EINVAL),
                         ("lookups 1", errno.EINVAL)]:
        try:
            got = mapped.message(text)
        except OSError as error:
            got = error.errno
        tap.equal(got, wanted, f"message '{text}': refused")


tap = Tap()
generator = random.Random(4)
load("loop")
run("modprobe", "dm-mod")
stack = lsmt_writer.random_stack(generator, SECTORS, 3)
blobs = [lsmt_writer.layer(segments, SECTORS) for segments in stack]
model = lsmt_writer.Model(stack, SECTORS)
with Devices() as devices:
    line = stack_table(devices, blobs, SECTORS)
    check_autoload(tap, "dm-overlaybd", line, model.content)
    load("dm-overlaybd")
    tap.equal(versions("overlaybd"), ["v1.1.0"], "dmsetup targets: the version")
    with dm_ioctl.Mapped("status", line) as mapped:
        check_status(tap, mapped, line, stack, model)
        words = mapped.status(dm_ioctl.TABLE).split()
        check_lookup(tap, mapped, model, words[4::2])

    check_measurement(tap, devices)

    with dm_ioctl.Mapped("one", line) as one, dm_ioctl.Mapped("two", line) as two:
        good = all(read_direct(mapped.node, 0, SECTORS * 512) == model.content for mapped in (one, two, one))
        tap.result(good, "two devices over the same layers: content")
        one.remove()
        tap.result(read_direct(two.node, 0, SECTORS * 512) == model.content, "the second works without the first")

    _, _, _, _, device, size, *others = line.split()
    double = f"0 {SECTORS} overlaybd 3 {device} {size} {device} {size} {device} {size}"
    with dm_ioctl.Mapped("double", double) as mapped:
        single = lsmt_writer.Model(stack[:1], SECTORS)
        tap.result(read_direct(mapped.node, 0, SECTORS * 512) == single.content, "one layer three times: content")
        tap.equal([int(word) for word in mapped.status().split()[7:9]], [0, 0], "the topmost of them owns everything")
    many = f"0 {SECTORS} overlaybd 255" + f" {device} {size}" * 255
    with dm_ioctl.Mapped("many", many) as mapped:
        tap.result(read_direct(mapped.node, 0, SECTORS * 512) == single.content, "255 layers: content")
        with dm_ioctl.Mapped("reloaded", mapped.status(dm_ioctl.TABLE)) as again:
            tap.equal(again.status(dm_ioctl.TABLE), mapped.status(dm_ioctl.TABLE),
                      "255 layers: the table reloads verbatim")
tap.finish()
