# SPDX-License-Identifier: GPL-2.0
"""Which kernels Debian's archive has, and which of them are complete: image, headers and source in one version.

Versions come and go within days, so none is named anywhere: the newest and the oldest that serve are looked for.
"""

import re
import subprocess
from typing import NamedTuple

from cache import CACHE, Failure, step

# The flavours of Debian's kernels for x86_64: the smaller one, which everything runs with, and that of machines.
CLOUD, GENERAL = "cloud-amd64", "amd64"
# The oldest series that the modules support; Debian enables CONFIG_RUST from it on.
OLDEST = (7, 2)


class Release(NamedTuple):
    """A release (`uname -r`), its series, and its Debian version."""

    name: str
    series: tuple
    version: str


class Archive:
    """The archives that apt is configured for, in the toolchain root or on the host, and a flavour of their kernels."""

    def __init__(self, flavour=CLOUD):
        self.flavour = flavour
        step("updating the package lists", ["apt-get", "update", "-o", "APT::Update::Error-Mode=any"],
             CACHE / "log" / "apt-update.log", "The Debian mirror must be reachable; see OVBD_MIRROR in the README.")

    def names(self, prefix):
        """The names of the packages that begin with `prefix`."""
        return _apt_cache("pkgnames", prefix).split()

    def versions(self, package):
        """The versions of `package` that there are."""
        return {line.split("|")[1].strip() for line in _apt_cache("madison", package).splitlines()}

    def packages(self, release):
        """What has to be downloaded of a release, as `name=version`: the image, in one package or several as the Debian
        release has it, the headers with what they share, and the source."""
        headers = f"linux-headers-{release.name}"
        shared = re.findall(r"linux-(?:headers|kbuild)-[^ ,]+", next(
            (line for line in _apt_cache("show", f"{headers}={release.version}").splitlines()
             if line.startswith("Depends: ")), ""))
        images = [f"linux-{part}-{release.name}" for part in ("image", "binary", "modules", "base")]
        return [f"{name}={release.version}" for name in
                (*(name for name in images if release.version in self.versions(name)), headers, *shared,
                 _source(release.series))]

    def newest(self):
        """The newest complete release."""
        return self._first_complete(self._releases(), [])

    def oldest(self):
        """The newest complete release of the oldest series that has one, and why that is not the oldest supported
        series, or None where it is."""
        reasons = []
        # The sort keeps the order within a series.
        release = self._first_complete(sorted(self._releases(), key=lambda found: found[1]), reasons)
        if release.series == OLDEST:
            return release, None
        return release, "\n  ".join([f"the archive has no complete Linux {_dotted(OLDEST)}, the oldest supported; the "
                                     f"oldest there is, {release.name}, takes its place", *reasons])

    def _releases(self):
        """The releases of supported series that have headers, as (name, series), the newest first."""
        pattern = re.compile(rf"linux-headers-((\d+)\.(\d+)(?:\.(\d+))?[^-]*-{self.flavour})")
        found = []
        for name in self.names("linux-headers-"):
            if match := pattern.fullmatch(name):
                major, minor, patch = (int(number or 0) for number in match.group(2, 3, 4))
                if (major, minor) >= OLDEST:
                    found.append(((major, minor), patch, match[1]))
        return [(name, series) for series, _, name in sorted(found, reverse=True)]

    def _first_complete(self, releases, reasons):
        for name, series in releases:
            image = self.versions(f"linux-image-{name}")
            both = self.versions(f"linux-headers-{name}") & image
            if found := both & self.versions(_source(series)):
                return Release(name, series, max(found))
            reasons.append(f"{name}: no {'source' if both else 'image'} of the version of its headers")
        raise Failure(f"no Debian kernel {_dotted(OLDEST)} or newer ({self.flavour}) is complete in the configured archives"
                      + "".join(f"\n  {reason}" for reason in reasons)
                      + "\nOn a Debian host its apt sources need the backports; OVBD_ROOT=always uses a root that has "
                      "them.")


def _apt_cache(*arguments):
    return subprocess.run(["apt-cache", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True).stdout


def _dotted(series):
    return ".".join(map(str, series))


def _source(series):
    return f"linux-source-{_dotted(series)}"
