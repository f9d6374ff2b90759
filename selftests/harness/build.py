# SPDX-License-Identifier: GPL-2.0
"""Runs the project's Makefile and Kbuild, for everything that needs what they make."""

import shutil
import subprocess

from cache import SOURCE

# What Kbuild takes of the checkout; the objects for other kernels stay apart from those for the stock kernel.
PARTS = ["Kbuild", "rust", "dm-overlaybd", "dm-zfile", "selftests/dm-linear-twin", "selftests/dm-zfile-parts",
         "selftests/dm-kunit"]


def make(*targets, **variables):
    """Runs targets of the project's Makefile, which may come back here and then need the inherited lock."""
    arguments = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "--no-print-directory", *arguments, *targets]
    return subprocess.run(command, cwd=SOURCE, close_fds=False).returncode


def kbuild(kernel, *arguments, source=SOURCE):
    """Runs Kbuild for the modules of this checkout, or of another, in the tree of `kernel`."""
    command = ["make", "--no-print-directory", "-C", str(kernel.build), f"M={source}", *kernel.make_arguments(),
               *arguments]
    return subprocess.run(command).returncode


def modules(kernel, patch=None):
    """Builds the targets and the modules that only tests use; returns the exit status. For other kernels than the
    newest stock kernel that is in a copy, to which `patch` may be applied."""
    if kernel.modules != SOURCE:
        _copy_to(kernel.modules)
    if patch:
        apply = ["patch", "--strip=1", "--fuzz=0", "--directory", kernel.modules, "--input", patch]
        if status := subprocess.run(apply).returncode:
            return status
    return kbuild(kernel, *kernel.module_make, "DM_SELFTESTS=1", "modules", source=kernel.modules)


def _copy_to(directory):
    directory.mkdir(parents=True, exist_ok=True)
    # A file that a patch changed must come back newer than what was built of it, so times are not copied. Bindings are
    # made for each kernel: the first rule that fits a name counts.
    subprocess.run(["rsync", "--recursive", "--perms", "--checksum", "--relative", "--delete",
                    "--exclude=*_generated.rs", "--include=*/", "--include=*.rs", "--include=*.c", "--include=*.h",
                    "--include=Kbuild", "--include=bindgen_parameters", "--exclude=*",
                    *PARTS, f"{directory}/"], cwd=SOURCE, check=True)


def same_bindings_without_makefile(kernel):
    """Whether a tree that lacks the kernel's rust/Makefile, as those that some distributions install, gives the bindings
    that `modules` made."""
    directory = SOURCE / "build/bindings"
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "rust").mkdir(parents=True)
    shutil.copytree(SOURCE / "rust/bindings", directory / "rust/bindings",
                    ignore=shutil.ignore_patterns(".*", "*_generated.rs"))
    (directory / "Kbuild").write_text("obj-m += rust/bindings/\n")
    # What is given to make counts more than what its files say.
    status = kbuild(kernel, "rust-makefile=", "modules", source=directory)
    made = "rust/bindings/bindings_generated.rs"
    return status == 0 and (directory / made).read_bytes() == (SOURCE / made).read_bytes()


def clippy(kernel):
    """Kernel clippy. It compiles in place of rustc, so a build that follows compiles again."""
    return kbuild(kernel, "DM_SELFTESTS=1", "CLIPPY=1", "KRUSTFLAGS=-Dwarnings", "modules")
