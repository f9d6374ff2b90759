#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What a layer over a tar costs, beside what must be done at least: the file system's tool, one read of the tar, and lz4 of
it. What of it is not in the tar, how much memory a million files take, and a random read at several block sizes.

Seconds of wall-clock time and of CPU time, the least of ROUNDS, in turns. The tar is /usr of the toolchain root, at most
MB= of it. Started by `make bench-tar` there.
"""

import io
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

OVBD = pathlib.Path("tools/target/release/ovbd").resolve()
READS = pathlib.Path("tools/target/release/examples/random_reads").resolve()
BYTES = int(os.environ.get("MB", "1024")) << 20
ROUNDS = int(os.environ.get("ROUNDS", "3"))
MEMBERS = int(os.environ.get("FILES", "1000000"))


def run(*command, text=""):
    """Runs a command on a text, and returns its wall-clock time and CPU time in seconds and what it prints."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([str(word) for word in command], input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}: {done.stderr.decode()}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def make_tar(path):
    """Files of /usr until there is enough."""
    names, size = [], 0
    for folder, folders, files in os.walk("/usr"):
        folders.sort()
        folders[:] = [name for name in folders if os.path.join(folder, name) != "/usr/lib/modules"]
        names += [folder, *(os.path.join(folder, name) for name in sorted(files))]
        size += sum(os.lstat(os.path.join(folder, name)).st_size for name in files)
        if size >= BYTES:
            break
    run("tar", "--create", "--file", path, "--no-recursion", "--null", "--files-from=-", text="\0".join(names))


def make_many(path, size):
    """A tar of small files, none like another if they have any content."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(MEMBERS):
            member = tarfile.TarInfo(f"d{number // 1000}/file{number}")
            member.size = size
            tar.addfile(member, io.BytesIO(str(number).encode().ljust(size, b".")))


def peak_memory(*command):
    """The most memory that a command itself had, in MiB: not the programs that it starts."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if found := re.search(r"VmHWM:\s+(\d+)", text):
            most = max(most, int(found[1]))
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"error: {' '.join(map(str, command))}")
    return most / 1024


def speed(folder, tar):
    image, raw, layer = folder / "image", folder / "raw", folder / "layer"
    times = {"mkfs.erofs --tar=f": [], "read": [], "lz4": [], "ovbd build --from-tar": []}
    for _ in range(ROUNDS):
        times["mkfs.erofs --tar=f"].append(run("mkfs.erofs", "--quiet", "--tar=f", "-Enoinline_data", image, tar))
        times["read"].append(run("dd", f"if={tar}", "of=/dev/null", "bs=1M"))
        times["lz4"].append(run(OVBD, "build", "--raw", "--force", "-o", raw, tar))
        times["ovbd build --from-tar"].append(run(OVBD, "build", "--force", "--from-tar", tar, "-o", layer))
    least = {name: (min(one[0] for one in all_), min(one[1] for one in all_)) for name, all_ in times.items()}
    peer = [sum(one[place] for name, one in least.items() if not name.startswith("ovbd")) for place in (0, 1)]
    for name, (wall, cpu) in least.items():
        print(f"{name:22} {wall:7.2f} s, {cpu:7.2f} s of CPU")
    wall, cpu = least["ovbd build --from-tar"]
    print(f"{'':22} {wall / peer[0]:.2f} and {cpu / peer[1]:.2f} of the three others together")
    image.unlink()


def metadata(folder, tar):
    size = tar.stat().st_size
    for kind in ("erofs", "ext4"):
        layer = folder / f"{kind}.layer"
        run(OVBD, "build", "--fs", kind, "--format", "lsmt", "--from-tar", tar, "-o", layer)
        besides = layer.stat().st_size - size
        with open(layer, "rb") as file:
            file.seek(4096 + size)
            compressed = len(subprocess.run(["zstd", "-19", "-c"], input=file.read(), stdout=subprocess.PIPE, check=True).stdout)
        print(f"{kind}: {besides:,} bytes besides the tar of {size:,}: {100 * besides / size:.2f} %, "
              f"{100 * compressed / size:.2f} % compressed with zstd -19")


def random_reads(folder, tar):
    raw = folder / "reads.raw"
    run(OVBD, "export", folder / "erofs.layer", "-o", raw)
    ordinary = folder / "ordinary, 4k"
    run(OVBD, "build", "-o", ordinary, raw)
    layers = [ordinary]
    for size in ("4k", "16k", "64k"):
        layers.append(folder / f"over the tar, {size}")
        run(OVBD, "build", "--own-reader-only", "--block-size", size, "--from-tar", tar, "-o", layers[-1])
    lines = run(READS, 20000, *layers)[2].decode().splitlines()
    times = [float(line.rsplit(" ", 1)[1]) for line in lines]
    for layer, took in zip(layers, times):
        print(f"random 4 KiB, {layer.name:18} {took:6.2f} us, {took / times[0]:.2f} of the first; {layer.stat().st_size:,} bytes")


def main():
    folder = pathlib.Path(tempfile.mkdtemp(dir="build"))
    os.environ["TMPDIR"] = str(folder)
    try:
        tar = folder / "tar"
        make_tar(tar)
        speed(folder, tar)
        metadata(folder, tar)
        random_reads(folder, tar)
        tar.unlink()
        for size in (0, 100):
            many, layer = folder / "many", folder / "files"
            make_many(many, size)
            memory = peak_memory(OVBD, "build", "--force", "--from-tar", many, "-o", layer)
            print(f"{MEMBERS:,} files of {size} bytes: {memory:.0f} MiB of memory")
    finally:
        shutil.rmtree(folder)


main()
