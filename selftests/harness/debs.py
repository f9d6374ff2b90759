# SPDX-License-Identifier: GPL-2.0
"""Real packages of Debian, whose tars the tests make layers of: downloaded by apt, once, into the cache."""

import shutil

from archive import Archive
from cache import CACHE, SOURCE, alone, delete, fresh_directory, need_space, step
from root import NETWORK

FOLDER = CACHE / "debs"
# Guests do not see the cache.
VISIBLE = SOURCE / "build/debs"

# Sets of packages, each a stack: the packages of one are layers over each other. Small ones with many kinds of members: set-user-ID
# programs, hard and symbolic links, thousands of small files, names that are not ASCII.
SETS = ["bash", "coreutils", "tzdata tzdata-legacy", "perl-base", "libpython3.13-minimal python3.13-minimal", "e2fsprogs logsave",
        "ncurses-base ncurses-term", "ca-certificates openssl", "sudo passwd login.defs", "util-linux mount"]


def ensure():
    """Downloads the packages that are missing. Returns a folder with them that guests see."""
    names = " ".join(SETS).split()

    def missing():
        return [name for name in names if not list(FOLDER.glob(f"{name}_*.deb"))]

    if missing():
        with alone("debs"):
            # Another run may have done the work while this one waited.
            if missing():
                need_space(1, "packages for tests")
                Archive()
                partial = fresh_directory(CACHE / "debs.partial")
                step("downloading packages for tests", ["sh", "-ec", 'cd "$0" && apt-get download "$@"', str(partial), *names],
                     CACHE / "log" / "debs.log", NETWORK)
                delete(FOLDER)
                partial.rename(FOLDER)
    shutil.copytree(FOLDER, fresh_directory(VISIBLE), dirs_exist_ok=True)
    return VISIBLE
