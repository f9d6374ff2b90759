# SPDX-License-Identifier: GPL-2.0
"""The toolchain root: a Debian 13 tree with the compilers that Debian builds its kernel with, QEMU and virtme-ng.

A Rust module only loads into the stock kernel when the same rustc built both, so the host's toolchain is used
only on a host that is Debian 13 or newer and has every package; any other host gets a root of its own in the
cache. Commands enter it with chroot in a private mount namespace: the mounts disappear with the process, however
it ends.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys

from cache import CACHE, SOURCE, Failure, delete, exclusive, fresh_directory, need_space, share, step

SUITE = "trixie"
ROOT = CACHE / "root"
MIRROR = os.environ.get("OVBD_MIRROR", "http://deb.debian.org/debian")

# What the kernel build, the tools, the packages, the guest and its tests need; one name per line of a stable order.
PACKAGES = """
    apt-utils bc bindgen bison btrfs-progs busybox-static ca-certificates cargo clang-19 cpio cryptsetup-bin curl
    debhelper dh-dkms dmsetup docker-registry dosfstools dpkg-dev dwarves e2fsprogs erofs-utils fdisk fio flex
    gcc-14 git iproute2 keyutils kmod libarchive13t64 libc6-dev libclang-19-dev libdevmapper-dev libelf-dev libnss3-tools
    libssl-dev lintian linux-perf lld-19 lvm2 make mmdebstrap openssl oras patch pkcs11-provider pkg-config procps pyflakes3 python3
    qemu-system-x86 qemu-utils rsync rust-clippy rust-src rustc rustfmt skopeo squashfs-tools systemd-cryptsetup systemd-sysv
    thin-provisioning-tools udev util-linux virtiofsd virtme-ng xfsprogs xorriso xz-utils zstd
""".split()

# Host files that make the network work inside the root as it does outside: names and trusted certificates.
HOST_FILES = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"]

NETWORK = (
    f"If the network is the cause: the mirror {MIRROR} must be reachable "
    "(OVBD_MIRROR and http_proxy are honoured); the next run starts this step afresh."
)


def check_host():
    """Refuses what cannot work before anything is downloaded."""
    if platform.machine() != "x86_64":
        raise Failure(f"this machine is {platform.machine()}; the stock kernel tests need x86_64 (amd64)")
    if os.geteuid() != 0:
        raise Failure("root is needed (chroot, mounts, apt): run this command as root or with sudo")
    if not shutil.which("apt-get"):
        raise Failure("apt-get is missing: a Debian 12 or newer host is needed")


def host_is_enough():
    """Whether the host itself is a Debian 13 or newer that has every package."""
    if os.environ.get("OVBD_ROOT") == "always":
        return False
    try:
        release = platform.freedesktop_os_release()
        if release["ID"] != "debian" or int(release.get("VERSION_ID", "0")) < 13:
            return False
    except (OSError, KeyError, ValueError):
        return False
    return not missing_packages(None)


def missing_packages(root):
    """The packages of `PACKAGES` that are not installed in `root` (None: on the host)."""
    command = ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n"]
    if root:
        command.insert(1, f"--admindir={root}/var/lib/dpkg")
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    installed = {line.split()[0] for line in listing.splitlines() if line.endswith(" installed")}
    return [name for name in PACKAGES if name not in installed]


def sources():
    """The archive lines of the root; the backports carry the kernel."""
    return [
        f"deb {MIRROR} {SUITE} main",
        f"deb {MIRROR} {SUITE}-updates main",
        f"deb {MIRROR} {SUITE}-backports main",
    ]


def ensure():
    """Makes the toolchain root, or installs what it lacks; returns it, or None where the host serves."""
    check_host()
    share()
    if host_is_enough():
        return None
    wanted = hashlib.sha256("\n".join([SUITE, *PACKAGES]).encode()).hexdigest()
    stamp = ROOT / "etc" / "dm-overlaybd-root"

    def current():
        # A root that another checkout gave more packages serves too: nobody has to wait for its users.
        return stamp.exists() and (stamp.read_text() == wanted or not missing_packages(ROOT))

    if not current():
        with exclusive():
            # Another run may have done the work while this one waited.
            if not current():
                _install_missing() if stamp.exists() else _create()
                stamp.write_text(wanted)
    return ROOT


def _create():
    need_space(8, "a toolchain root with a kernel tree")
    for path in CACHE.glob("root*"):
        delete(path)
    partial = fresh_directory(CACHE / "root.partial")
    if not shutil.which("mmdebstrap"):
        step(
            "installing mmdebstrap on this machine",
            ["sh", "-ec", "apt-get update && apt-get install -y --no-install-recommends mmdebstrap"],
            CACHE / "log" / "mmdebstrap-install.log",
            "mmdebstrap comes from this machine's own apt sources; make `apt-get install mmdebstrap` work.",
        )
    # In a mount namespace of its own: mmdebstrap's mounts must not outlive it, however it ends.
    step(
        f"making the toolchain root {ROOT} (700 MB to download, 1 to 2 minutes)",
        ["unshare", "--mount", "--propagation", "private",
         "mmdebstrap", "--variant=apt", "--aptopt=Apt::Install-Recommends \"false\"",
         f"--include={','.join(PACKAGES)}", SUITE, str(partial), *sources()],
        CACHE / "log" / "root.log",
        NETWORK,
    )
    partial.rename(ROOT)


def _install_missing():
    names = missing_packages(ROOT)
    if names:
        step(
            f"adding {len(names)} packages to the toolchain root",
            [*enter_command(ROOT), "sh", "-ec",
             f"apt-get update && apt-get install -y --no-install-recommends {' '.join(names)}"],
            CACHE / "log" / "root-add.log",
            NETWORK,
        )


def enter_command(root):
    """The command that runs its arguments inside `root` (None: on the host), in a private mount namespace."""
    harness = pathlib.Path(__file__).resolve().parent
    return ["unshare", "--mount", "--propagation", "private", sys.executable, str(harness), "in-namespace",
            str(root or "/")]


def _mount(*arguments):
    result = subprocess.run(["mount", *arguments], stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise Failure(f"mount {' '.join(arguments)}: {result.stderr.strip()}; "
                      "in a container, root needs CAP_SYS_ADMIN for this")


def in_namespace(root, command):
    """Called in the new mount namespace: arranges the mounts below `root` and becomes `command`."""
    root = pathlib.Path(root)
    cases = pathlib.Path(os.environ.get("CASES", "")).resolve()
    binds = [SOURCE, CACHE] + ([cases] if cases != SOURCE and cases.is_dir() else [])
    if root != pathlib.Path("/"):
        _mount("-t", "proc", "proc", f"{root}/proc")
        _mount("-t", "sysfs", "sys", f"{root}/sys")
        _mount("--rbind", "/dev", f"{root}/dev")
        for name in ("run", "tmp"):
            _mount("-t", "tmpfs", "tmpfs", f"{root}/{name}")
        for path in HOST_FILES:
            inside = root / path[1:]
            if os.path.exists(path) and inside.exists():
                _mount("--bind", os.path.realpath(path), str(inside))
        for path in binds:
            inside = root / str(path)[1:]
            inside.mkdir(parents=True, exist_ok=True)
            _mount("--bind", str(path), str(inside))
    # cargo finds its usual directory; each checkout has its own, so that runs side by side keep their programs apart.
    target = CACHE / "target" / str(SOURCE)[1:].replace("/", "-")
    target.mkdir(parents=True, exist_ok=True)
    inside = pathlib.Path(f"{root}/{SOURCE}/tools/target")
    inside.mkdir(parents=True, exist_ok=True)
    _mount("--bind", str(target), str(inside))
    modules = pathlib.Path(f"{root}/usr/lib/modules")
    modules.mkdir(exist_ok=True)
    # Also before the first kernel is prepared: what is put there later appears at once.
    images = CACHE / "modules"
    images.mkdir(exist_ok=True)
    _mount("--bind", str(images), str(modules))

    passed = ("TERM", "CI", "COLUMNS", "T", "KERNEL", "B", "W", "LENS", "REASON", "CASES", "MB", "LAYERS", "ROUNDS", "FILES")
    environment = {key: value for key, value in os.environ.items() if key in passed
                   or key.startswith(("OVBD_", "http_proxy", "https_proxy", "no_proxy"))}
    environment |= {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/llvm-19/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "CARGO_HOME": str(CACHE / "cargo"),
        "OVBD_INSIDE": "1",
    }
    os.chroot(root)
    os.chdir(SOURCE)
    os.execvpe(command[0], command, environment)
