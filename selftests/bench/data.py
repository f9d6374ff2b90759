# SPDX-License-Identifier: GPL-2.0
"""Makes the benchmark's data before the guest boots: a slice of a tar of the toolchain root's /usr/lib, and the same
bytes in every compressed form that is compared. Runs inside the root; the argument is the folder to fill.

The slice is the first one that lz4 makes about as small as typical images are (62 % in blocks of 4 KiB). It depends
on nothing but the root's packages; what is already there for the same packages is kept.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

SOURCE = pathlib.Path(__file__).resolve().parents[2]
OVBD = SOURCE / "tools/target/release/ovbd"
TREE = pathlib.Path("/usr/lib")
SLICE = 64 << 20
# What a layer of a qcow2 chain takes its share of; see layered.py.
SEGMENT, CHAINS = 64 << 10, (1, 8, 64)
ROOT_BYTES, ROOT_LAYERS = 192 << 20, 10
RATIO, TOLERANCE, SLICES = 0.62, 0.02, 24

ZFILES = {f"{algorithm}-{size}k{'' if crc else '-nocrc'}.zfile": ["--algo", algorithm, "--block-size",
                                                                    str(size << 10), *([] if crc else ["--no-crc"]),
                                                                    "--own-reader-only"]
          for algorithm in ("lz4", "zstd") for size in (4, 16, 64) for crc in (True, False)}
TEXT_ZFILES = {f"text-lz4-{size}k.zfile": size << 10 for size in (4, 16, 64)}
TEXT = 16 << 20
EROFS = {"erofs-lz4-4k.img": ["-zlz4", "-C4096"], "erofs-lz4-64k.img": ["-zlz4", "-C65536"],
         "erofs-zstd-4k.img": ["-zzstd", "-C4096"], "erofs-zstd-64k.img": ["-zzstd", "-C65536"]}
SQUASHFS = {"squashfs-lz4-4k.img": ["-comp", "lz4", "-b", "4096"],
            "squashfs-lz4-128k.img": ["-comp", "lz4", "-b", "131072"],
            "squashfs-zstd-128k.img": ["-comp", "zstd", "-b", "131072"]}


def run(*command):
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}:\n{result.stdout.decode(errors='replace')}")


class Slices:
    """A file object that cuts what is written to it into slices and shows each to `take`, until that returns True."""

    class Enough(Exception):
        """A slice was taken."""

    def __init__(self, take):
        self.take = take
        self.slice = bytearray()

    def write(self, data):
        self.slice += data
        if len(self.slice) >= SLICE:
            if self.take(bytes(self.slice[:SLICE])):
                raise self.Enough
            self.slice = self.slice[SLICE:]
        return len(data)


def plain(member):
    """Without what differs between two installations of the same packages."""
    member.mtime = 0
    if "/__pycache__" in member.name or member.name.startswith("usr/lib/modules"):
        return None
    return member


def choose(folder):
    """Writes the slice to use; returns its share in lz4 and its number."""
    candidates = []

    def take(data):
        (folder / "candidate").write_bytes(data)
        run(OVBD, "build", "--raw", "--force", "-o", folder / "candidate.zfile", folder / "candidate")
        ratio = (folder / "candidate.zfile").stat().st_size / SLICE
        candidates.append(ratio)
        best = min(candidates, key=lambda other: abs(other - RATIO))
        if best == ratio:
            (folder / "candidate").rename(folder / "data")
        return abs(ratio - RATIO) < TOLERANCE or len(candidates) == SLICES

    try:
        # tarfile adds the entries of a directory in the order of their names.
        with tarfile.open(fileobj=Slices(take), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            tar.add(TREE, "usr/lib", filter=plain)
    except Slices.Enough:
        pass
    if not candidates:
        sys.exit(f"error: {TREE} has less than {SLICE >> 20} MiB")
    best = min(candidates, key=lambda other: abs(other - RATIO))
    return best, candidates.index(best)


def write_text(folder):
    """Source code in Python, in the order of the names, compressed with lz4."""
    text = bytearray()
    for path in sorted(TREE.glob("python3*/**/*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT:
            break
    (folder / "text").write_bytes(text[:len(text) - len(text) % (64 << 10)][:TEXT])
    for name, block_bytes in TEXT_ZFILES.items():
        run(OVBD, "build", "--raw", "--block-size", block_bytes, "-o", folder / name, folder / "text")


def write_chain(folder, data, count):
    """A chain of qcow2 files, of which number n holds every `count`th segment from the nth on."""
    folder.mkdir()
    for number in range(count):
        raw, layer = folder / "raw", folder / f"{number}.qcow2"
        with open(raw, "wb") as file:
            for at in range(number * SEGMENT, SLICE, count * SEGMENT):
                file.seek(at)
                file.write(data[at:at + SEGMENT])
            file.truncate(SLICE)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, layer)
        if number:
            # Unsafe in that nothing is compared: what this layer lacks is a hole in it.
            run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", f"{number - 1}.qcow2", layer)
    raw.unlink()


def write_sealed(folder, data):
    """The content as a compressed layer, the seal of it, and both as one image."""
    folder.mkdir()
    layers = [folder / "base.zfile", folder / "seal.zfile"]
    run(OVBD, "build", "--verity", layers[1], "-o", layers[0], data)
    run(OVBD, "export", *layers, "-o", folder / "image")


def required_packages():
    """The packages of priority `required` and all that they depend on: the smallest Debian."""
    listing = subprocess.run(["dpkg-query", "-W", "-f=${Package}\t${Priority}\t${Depends}, ${Pre-Depends}\n"],
                             stdout=subprocess.PIPE, text=True, check=True).stdout
    packages = {name: (priority, depends) for name, priority, depends in
                (line.split("\t") for line in listing.splitlines())}
    wanted, todo = set(), [name for name, (priority, _) in packages.items() if priority == "required"]
    while todo:
        name = todo.pop()
        if name in packages and name not in wanted:
            wanted.add(name)
            todo += re.findall(r"(?:^|[,|])\s*([a-z0-9.+-]+)", packages[name][1])
    return sorted(wanted)


def write_root(folder):
    """The files of the smallest Debian in each of the forms that are compared."""
    tree = folder / "root"
    paths = subprocess.run(["dpkg-query", "-L", *required_packages()], stdout=subprocess.PIPE, text=True,
                           check=True).stdout.splitlines()
    # Directories are named as well: without recursion each entry comes once.
    names = sorted({path[1:] for path in paths if path.startswith("/") and os.path.lexists(path) and path != "/."})
    tree.mkdir()
    pack = subprocess.Popen(["tar", "-C", "/", "--no-recursion", "-cf", "-", "--null", "-T", "-"],
                            stdin=subprocess.PIPE, stdout=open(folder / "root.tar", "wb"))
    pack.communicate("\0".join(["bin", "lib", "lib64", "sbin", *names]).encode())
    run("tar", "-C", tree, "-xf", folder / "root.tar")
    image = folder / "root.ext4"
    # The journal of a file system that is only read is a waste.
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, image, f"{ROOT_BYTES >> 10}k")
    run("mkfs.erofs", "-T0", "-zlz4", "-C65536", folder / "root.erofs", tree)
    run("mksquashfs", tree, folder / "root.squashfs", "-comp", "lz4", "-noappend", "-all-time", "0", "-mkfs-time", "0")
    run(OVBD, "build", "--raw", "-o", folder / "root.zfile", image)
    # A stack: layer n adds every ROOT_LAYERSth segment from the nth on.
    data = image.read_bytes()
    layers = []
    for number in range(ROOT_LAYERS):
        raw = bytearray(len(data))
        for start in range(0, len(data), SEGMENT):
            if start // SEGMENT % ROOT_LAYERS <= number:
                raw[start:start + SEGMENT] = data[start:start + SEGMENT]
        (folder / "root.raw").write_bytes(raw)
        for kind in ("lsmt", "zfile"):
            below = [word for path in layers for word in ("--base", f"{path}.{kind}")] if number else []
            run(OVBD, "build", "--format", kind, *below, "-o", folder / f"root-{number}.{kind}", folder / "root.raw")
        layers.append(folder / f"root-{number}")
    for path in (folder / "root.raw", folder / "root.tar"):
        path.unlink()
    shutil.rmtree(tree)


def main():
    folder = pathlib.Path(sys.argv[1])
    recipe = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    recipe.update(pathlib.Path("/var/lib/dpkg/status").read_bytes())
    recipe.update(OVBD.read_bytes())
    stamp = folder / "recipe.json"
    if stamp.exists() and json.loads(stamp.read_text())["recipe"] == recipe.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tree").mkdir(parents=True)
    ratio, number = choose(folder)
    data = folder / "data"
    print(f"==> benchmark data: slice {number} of a tar of {TREE}, lz4 makes it {ratio:.1%}", flush=True)
    for name, options in ZFILES.items():
        run(OVBD, "build", "--raw", *options, "-o", folder / name, data)
    write_text(folder)
    (folder / "tree" / "data").hardlink_to(data)
    for name, options in EROFS.items():
        run("mkfs.erofs", "-T0", *options, folder / name, folder / "tree")
    for name, options in SQUASHFS.items():
        run("mksquashfs", folder / "tree", folder / name, *options, "-noappend", "-all-time", "0", "-mkfs-time", "0")
    for count in CHAINS:
        write_chain(folder / f"qcow2-{count}", data.read_bytes(), count)
    write_sealed(folder / "sealed", data)
    write_root(folder)
    for path in folder.glob("candidate*"):
        path.unlink()
    stamp.write_text(json.dumps({"recipe": recipe.hexdigest(), "lz4 4 KiB": ratio, "slice": number,
                                 "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}))


main()
