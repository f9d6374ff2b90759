# SPDX-License-Identifier: GPL-2.0
"""The Debian packages as they are installed: in a fresh Debian with a stock kernel and its initrd, as files, and where
apt is to take a newer kernel.

The fresh system is made once and kept in the cache; each run has an overlay of it in memory.
"""

import contextlib
import pathlib
import re
import subprocess
import tempfile

import cache
import packages
import root
from cache import CACHE, SOURCE, alone, fresh_directory, step
from report import Counts

SYSTEM = CACHE / "installed"
# What a small server has, and what the tests look with.
WITH = ["systemd-sysv", "udev", "dmsetup", "initramfs-tools", "zstd", "kmod", "e2fsprogs", "cryptsetup-bin", "file",
        "lvm2"]
# What apt, dpkg and depmod note of any installation, or a package that stays made anew.
NOTES = re.compile(r"/(var/(log|cache|lib/(apt|dpkg))|boot/initrd\.img-|usr/lib/modules/[^/]+/modules\.|etc/ld\.so\.cache"
                   r"|tmp|run|dev|proc|sys)")
# Of the command and the modules for one kernel.
TOGETHER_BYTES = 3_800_000
OVBD = SOURCE / "tools/target/release/ovbd"
SERVICE = """[Unit]
After=multi-user.target {after}
[Service]
Type=oneshot
Environment=DEBIAN_FRONTEND=noninteractive
ExecStart=/usr/local/bin/report
[Install]
WantedBy=multi-user.target
"""
PINNED = r"Package: linux-*\nPin: release n={suite}-backports\nPin-Priority: 990\n"


def fresh_system(kernel):
    """A Debian with the stock kernel, as mmdebstrap makes it."""
    place = SYSTEM / kernel.release
    stamp = place / "etc/dm-overlaybd-made-from"
    wanted = f"{root.SUITE} {kernel.version} {' '.join(WITH)}"
    with alone("installed"):
        if stamp.exists() and stamp.read_text() == wanted:
            return place
        cache.need_space(2, "a fresh system")
        cache.delete(SYSTEM)
        partial = fresh_directory(CACHE / "installed.partial")
        pin = PINNED.format(suite=root.SUITE)
        flavour = kernel.release.split("-", 1)[1]
        image = [f"linux-image-{name}={kernel.version}" for name in (flavour, kernel.release)]
        step(f"making a Debian {root.SUITE} with the kernel {kernel.release}",
             ["mmdebstrap", "--variant=apt", "--aptopt=Apt::Install-Recommends \"false\"",
              "--setup-hook=mkdir -p \"$1/etc/apt/preferences.d\"; "
              f"printf '{pin}' >\"$1/etc/apt/preferences.d/kernel\"",
              f"--include={','.join(WITH + image)}", root.SUITE, str(partial), *root.sources()],
             CACHE / "log/installed.log", root.NETWORK + " If the archive has the kernel no more: make kernel-update.")
        (partial / stamp.relative_to(place)).write_text(wanted)
        SYSTEM.mkdir(exist_ok=True)
        partial.rename(place)
    return place


@contextlib.contextmanager
def overlay(lower):
    """An overlay of a system, in memory, with what programs want to find below it."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name in ("upper", "work", "top"):
            (folder / name).mkdir()
        top = folder / "top"
        run("mount", "-t", "overlay", "overlay", "-o",
            f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work", top)
        try:
            run("mount", "-t", "proc", "proc", top / "proc")
            run("mount", "-t", "sysfs", "sysfs", top / "sys")
            run("mount", "--rbind", "/dev", top / "dev")
            run("mount", "--make-rslave", top / "dev")
            yield top
        finally:
            # apt may have a terminal open a moment longer.
            run("umount", "--recursive", "--lazy", top)


def run(*command, **options):
    """Runs a command that must succeed; returns what it prints."""
    command = [str(word) for word in command]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                            **options)
    if result.returncode:
        raise Unexpected(f"{' '.join(command)}: exit status {result.returncode}\n{result.stdout}")
    return result.stdout


class Unexpected(Exception):
    """What a test did not want."""


def inside(top, script):
    """Runs a shell script in the system."""
    return run("chroot", top, "sh", "-ec", script,
               env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LC_ALL": "C.UTF-8", "HOME": "/root",
                    "DEBIAN_FRONTEND": "noninteractive"})


def write_program(path, text):
    """Writes a shell script."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def add_report(top, text, after=""):
    """A shell script for when the system has booted, the units `after` too; what it `say`s is on the console as
    vm.boot_system() reads it."""
    write_program(top / "usr/local/bin/report", 'say() { echo "report: $*" >/dev/console; }\n' + text)
    (top / "etc/systemd/system/report.service").write_text(SERVICE.format(after=after))
    inside(top, "echo fresh >/etc/hostname; systemd-machine-id-setup; systemctl enable report")


def copy_boot_files(top, release, folder, names=("vmlinuz", "initrd.img")):
    """The kernel and its initramfs of the system, into a folder."""
    for name in names:
        (folder / name).write_bytes((top / f"boot/{name}-{release}").read_bytes())


def make_image(top, path, size):
    """The system as an image of so many bytes. What is mounted in there is not part of it, and is unmounted."""
    run("sh", "-ec", 'umount "$0/proc" "$0/sys"; umount --recursive "$0/dev"; truncate -s "$2" "$1"; '
                     'mkfs.ext4 -q -d "$0" "$1"', top, path, size)


def expect(good, what):
    """Fails a test."""
    if not good:
        raise Unexpected(what)


def chosen(debs, release):
    """The two packages that a user would install."""
    return [next(debs.glob("ovbd_*.deb")), next(debs.glob(f"dm-overlaybd-modules-{release}_*.deb"))]


def install(top, debs, release):
    """Installs those."""
    paths = chosen(debs, release)
    size = sum(path.stat().st_size for path in paths)
    expect(size <= TOGETHER_BYTES, f"the packages have {size} bytes, at most {TOGETHER_BYTES}")
    for path in paths:
        (top / "tmp" / path.name).write_bytes(path.read_bytes())
    inside(top, "apt-get install -y --no-install-recommends /tmp/*.deb && rm /tmp/*.deb")


def files(top):
    """The names of all files that no program makes on the way."""
    found = run("find", top, "-xdev", "-not", "-type", "d", "-printf", "/%P\\n").splitlines()
    return {name for name in found if not NOTES.match(name)}


def modules(top, release):
    """The loader finds the modules that were installed, for that kernel."""
    for name in ("dm-overlaybd", "dm-zfile"):
        about = inside(top, f"modinfo -k {release} {name}")
        expect(re.search(rf"^vermagic: +{re.escape(release)} ", about, re.MULTILINE), about)
        said = inside(top, f"modprobe -S {release} -n -v {name}")
        expect(re.search(rf"^insmod .*/{re.escape(release)}/updates/.*{name}\.ko\.xz", said, re.MULTILINE), said)


def units(top):
    """systemd has nothing to say of the unit, and the verbs link it and remove the link."""
    said = inside(top, "systemd-analyze verify --man=no ovbd@disk.service")
    expect(not said, said)
    (top / "etc/ovbd/a-b.conf").write_text("layer /srv/base.zfile\n")
    inside(top, "ovbd enable a-b")
    link = top / r"etc/systemd/system/local-fs.target.wants/ovbd@a\x2db.service"
    expect(link.is_symlink(), "ovbd enable made no link")
    waits = (top / r"etc/systemd/system/ovbd@a\x2db.service.d/ovbd-layers.conf").read_text()
    expect('RequiresMountsFor="/srv/base.zfile"\n' in waits, waits)
    said = inside(top, r"systemd-analyze verify --man=no 'ovbd@a\x2db.service'")
    expect(not said, said)
    inside(top, "ovbd disable a-b")
    expect(not link.is_symlink(), "ovbd disable left the link")
    expect((top / "etc/ovbd/a-b.conf").exists(), "ovbd disable removed what the stack is made of")
    # For the purge.
    inside(top, "ovbd enable a-b")


def initramfs(top, release):
    """What boots from a stack is in the initramfs that installation made."""
    listing = inside(top, f"lsinitramfs /boot/initrd.img-{release}").splitlines()
    for name in ("usr/bin/ovbd", "usr/lib/ovbd/boot-functions", "usr/lib/ovbd/root-stack", "usr/lib/ovbd/root-state",
                 "usr/sbin/wipefs", "usr/lib/udev/rules.d/09-ovbd.rules", "scripts/local-top/ovbd", "scripts/local-bottom/ovbd"):
        expect(name in listing, f"no {name} in the initramfs")
    for name in ("loop", "dm-snapshot", "dm-overlaybd", "dm-zfile", "overlay"):
        expect(any(f"/{name}.ko" in line for line in listing), f"no {name} in the initramfs")


def layers(top):
    """The test of debian/tests that wants no modules."""
    (top / "tmp/test").mkdir()
    (top / "tmp/layers").write_bytes((SOURCE / "debian/tests/layers").read_bytes())
    inside(top, "AUTOPKGTEST_TMP=/tmp/test sh /tmp/layers")


def dkms(top, debs, kernel):
    """DKMS builds the modules in a tree that it makes of Debian's packages, and the loader finds them; removal leaves
    neither."""
    deb, = debs.glob("dm-overlaybd-dkms_*.deb")
    (top / "tmp" / deb.name).write_bytes(deb.read_bytes())
    series = ".".join(kernel.release.split(".")[:2])
    inside(top, "apt-get update")
    inside(top, f"apt-get install -y --no-install-recommends linux-headers-{kernel.release}={kernel.version} "
                f"linux-source-{series}={kernel.version} && apt-get install -y --no-install-recommends /tmp/{deb.name}")
    inside(top, f"dkms status dm-overlaybd -k {kernel.release} | grep -q installed || "
                f"dkms install dm-overlaybd/{deb.name.split('_')[1]} -k {kernel.release}")
    for name in ("dm-overlaybd", "dm-zfile"):
        about = inside(top, f"modinfo -k {kernel.release} {name}")
        expect(re.search(r"^filename: .*/updates/dkms/", about, re.MULTILINE) and kernel.release in about, about)
    inside(top, "apt-get purge -y dm-overlaybd-dkms")
    left = run("find", top / "usr/lib/modules" / kernel.release, top / "var/cache", "-path", "*overlaybd*")
    expect(not left, left)


def purge(top, before):
    """Purging the packages leaves nothing, and images of the store, which are data."""
    (top / "var/lib/ovbd/image").write_text("data")
    said = inside(top, "apt-get purge -y ovbd 'dm-overlaybd-modules-*'")
    left = files(top) - before
    expect(left == {"/var/lib/ovbd/image"}, f"left behind: {sorted(left)[:20]}")
    expect("/var/lib/ovbd has images and is kept" in said, said)
    expect(not (top / "etc/ovbd").exists(), "/etc/ovbd is left")


def check(counts, what, work, *arguments):
    """One test, and what came of it."""
    try:
        work(*arguments)
        counts.passed += 1
        print(f"ok    {what}", flush=True)
    except (Unexpected, OSError) as unexpected:
        counts.failed += 1
        print(f"FAIL  {what}\n        " + str(unexpected).replace("\n", "\n        "), flush=True)


def test(kernel, of, whole=False):
    """Builds the packages, with modules for the kernels `of`, and tests them; returns the counts. The whole of it builds
    them twice, and has DKMS build them."""
    debs = packages.build(of)
    counts = Counts()
    check(counts, "lintian has no errors", lint, debs)
    if whole:
        check(counts, "packages are the same when they are built again", reproducible, of, debs)
    if len(packages.cached_kernels()) > 1:
        check(counts, "apt takes a new kernel only with modules for it", bump, debs)
    else:
        counts.skipped += 1
        print("skip  apt takes a new kernel only with modules for it: there is one kernel", flush=True)
    with overlay(fresh_system(kernel)) as top:
        before = files(top)
        check(counts, "apt installs them", install, top, debs, kernel.release)
        check(counts, "the loader finds the modules", modules, top, kernel.release)
        check(counts, "the initramfs has what boots from a stack", initramfs, top, kernel.release)
        check(counts, "layers, without modules", layers, top)
        check(counts, "units, enable and disable", units, top)
        check(counts, "purge leaves only images", purge, top, before)
    if whole:
        with overlay(fresh_system(kernel)) as top:
            check(counts, "DKMS builds them", dkms, top, debs, kernel)
    return counts


def lint(debs):
    """No errors of lintian; warnings are shown."""
    print(run("lintian", "--allow-root", "--fail-on", "error", *debs.glob("*.deb")), end="")


def reproducible(of, debs):
    """Two builds give the same bytes."""
    names = packages.differing(of, debs)
    expect(not names, f"differ: {' '.join(names)}")


def fields(deb):
    """The control file of a package."""
    return run("dpkg-deb", "--field", deb)


def stanza(name, version, depends=""):
    """The control file of a package that is not ours."""
    depends = f"Depends: {depends}\n" if depends else ""
    return (f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\n{depends}"
            f"Description: stands in\n")


def bump(debs):
    """A local repository gets a newer kernel, first without modules for it."""
    old, new = reversed(packages.cached_kernels())
    flavour = new.release.split("-", 1)[1]
    meta, = debs.glob(f"dm-overlaybd-{flavour}_*.deb")

    def kernel(of):
        return [stanza(f"linux-modules-{of.release}", of.version),
                stanza(f"linux-image-{of.release}", of.version, f"linux-modules-{of.release} (= {of.version})"),
                stanza(f"linux-image-{flavour}", of.version, f"linux-image-{of.release} (= {of.version})")]

    def ours(of):
        modules, = debs.glob(f"dm-overlaybd-modules-{of.release}_*.deb")
        text = fields(meta).replace(new.release, of.release).replace(new.version, of.version)
        return [fields(modules), text]

    ovbd, = debs.glob("ovbd_*.deb")
    needed = re.findall(r"(?:^Depends: |, )([a-z0-9-]+)", re.search(r"^Depends: .*$", fields(ovbd), re.MULTILINE)[0])
    status = [text.replace("Version:", "Status: install ok installed\nVersion:", 1)
              for text in [*(stanza(name, "99") for name in needed), fields(ovbd), *kernel(old), *ours(old)]]

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name in ("state/lists/partial", "cache/archives/partial", "repository", "etc"):
            (folder / name).mkdir(parents=True)
        (folder / "status").write_text("\n".join(status))
        (folder / "etc/sources.list").write_text(f"deb [trusted=yes] file:{folder}/repository ./\n")
        options = [f"-oDir::State={folder}/state", f"-oDir::State::status={folder}/status",
                   f"-oDir::Cache={folder}/cache", f"-oDir::Etc={folder}/etc", "-oAPT::Sandbox::User=root"]

        def offer(stanzas, *verb):
            # A file of a repository has a size and a digest, which a simulation does not look at.
            extra = f"Filename: ./x.deb\nSize: 1\nSHA256: {'0' * 64}\n"
            (folder / "repository/Packages").write_text("\n".join(text + extra for text in stanzas))
            run("apt-get", *options, "update")
            said = run("apt-get", *options, "--simulate", *verb)
            return re.findall(r"^(Inst|Remv) (\S+)", said, re.MULTILINE)

        done = offer(kernel(new), "upgrade", "--with-new-pkgs")
        expect(not done, f"without modules for the new kernel, apt upgrade does {done}")
        done = offer(kernel(new), "dist-upgrade")
        expect(("Remv", f"dm-overlaybd-{flavour}") in done or not done, f"apt dist-upgrade does {done}")
        done = offer([*kernel(new), *ours(new)], "upgrade", "--with-new-pkgs")
        for name in (f"linux-image-{flavour}", f"linux-image-{new.release}", f"dm-overlaybd-{flavour}",
                     f"dm-overlaybd-modules-{new.release}"):
            expect(("Inst", name) in done, f"with modules for the new kernel, apt upgrade does {done}")
        expect(all(verb == "Inst" for verb, _ in done), f"apt upgrade removes: {done}")

