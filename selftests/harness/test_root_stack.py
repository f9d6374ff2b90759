# SPDX-License-Identifier: GPL-2.0
"""What the initramfs makes of the kernel's command line: the root device, and what the machine writes over it."""

import os
import pathlib
import subprocess
import tempfile
import unittest

from cache import SOURCE

STACK = SOURCE / "tools/boot/root-stack"
STATE = SOURCE / "tools/boot/root-state"
ERROR = pathlib.Path("/run/ovbd/error")
DEVICE = next((str(path) for path in sorted(pathlib.Path("/dev").iterdir()) if path.is_block_device()), None)
# Stand in for the programs: each says how it was called.
PROGRAM = '#!/bin/sh\necho "${0##*/} $*" >>"$CALLS"\n'


class Boot(unittest.TestCase):
    """A folder in which programs stand in for those of an initramfs."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.top = pathlib.Path(folder.name)
        for name, more in (("ovbd", ""), ("mount", ""), ("umount", ""), ("blkid", "echo ext4\n")):
            self.program(name, more)

    def program(self, name, more):
        path = self.top / name
        path.write_text(PROGRAM + more)
        path.chmod(0o755)

    def run_script(self, script, line, *arguments):
        """The exit status, and what was called."""
        (self.top / "cmdline").write_text(line + "\n")
        calls = self.top / "calls"
        calls.write_text("")
        environment = {"PATH": f"{self.top}:{os.environ['PATH']}", "CALLS": str(calls),
                       "OVBD_CMDLINE": str(self.top / "cmdline"),
                       # What dracut exports, which is the line itself.
                       "CMDLINE": "root=/dev/sda ro"}
        status = subprocess.run([script, *arguments], env=environment, stderr=subprocess.DEVNULL).returncode
        return status, calls.read_text().splitlines()


@unittest.skipUnless(os.geteuid() == 0 and DEVICE, "root and a block device are needed")
class RootStack(Boot):
    def boot(self, line):
        """The exit status, and how ovbd was called."""
        status, calls = self.run_script(STACK, line)
        return status, [call for call in calls if call.startswith("ovbd ")]

    def test_not_wanted(self):
        self.assertEqual(self.boot("root=/dev/sda1 ro"), (0, []))

    def test_layers_in_order(self):
        self.assertEqual(self.boot(f"ovbd={DEVICE}:a.zfile,b.zfile root=/dev/mapper/root"),
                         (0, ["ovbd --quiet up root a.zfile b.zfile"]))

    def test_what_is_checked(self):
        line = f"ovbd={DEVICE}:a.zfile,seal.zfile ovbd.verity=0123:4096 ovbd.signature=seal.p7s"
        self.assertEqual(self.boot(line),
                         (0, ["ovbd --quiet up --verity 0123:4096 --signature seal.p7s root a.zfile seal.zfile"]))

    def test_images_of_a_store(self):
        pathlib.Path("/run/ovbd/layers").mkdir(parents=True, exist_ok=True)
        layout = pathlib.Path("/run/ovbd/layers/oci-layout")
        layout.write_text("{}")
        self.addCleanup(layout.unlink)
        self.assertEqual(self.boot(f"ovbd={DEVICE}:h.x:5000/vm/disk:mon"),
                         (0, ["ovbd --quiet up --store /run/ovbd/layers/. root h.x:5000/vm/disk:mon"]))

    def test_the_last_of_ro_and_rw_counts(self):
        writable = "ovbd --quiet up --writable --cow /run/ovbd/memory/writes root a"
        self.assertEqual(self.boot(f"ovbd={DEVICE}:a ro quiet rw"), (0, [writable]))
        self.assertEqual(self.boot(f"rw ovbd={DEVICE}:a ro"), (0, ["ovbd --quiet up root a"]))
        self.assertEqual(self.boot(f"ovbd={DEVICE}:a rw ovbd.cow={DEVICE}"),
                         (0, [f"ovbd --quiet up --writable --cow {DEVICE} root a"]))

    def test_a_store_without_room(self):
        line, up = f"ovbd={DEVICE}:a rw ovbd.cow={DEVICE}", f"ovbd --quiet up --writable --cow {DEVICE} root a"
        for said, wanted in (("990/1000 8", (0, [up])), ("900/1000 8 Overflow", (0, [up])), ("Invalid", (0, [up])),
                             ("1000/1000 8 Overflow", (1, [up, "ovbd --quiet down root"]))):
            self.program("dmsetup", f"echo '0 4096 snapshot {said}'\n")
            self.assertEqual(self.boot(line), wanted, said)
        self.assertEqual(ERROR.read_text(), f"ovbd: {DEVICE} is full: boot with ro, or another generation\n")

    def test_a_device_may_come_later(self):
        for name, node in (("/dev/no-such", "/dev/no-such"), ("UUID=12-3", "UUID=12-3"), ("LABEL=x", "LABEL=x")):
            self.assertEqual(self.boot(f"ovbd={name}:a"), (75, []))
            self.assertEqual(ERROR.read_text(), f"ovbd: no device {node}\n")
        self.assertEqual(self.boot(f"ovbd={DEVICE}:a rw ovbd.cow=PARTUUID=no-such"), (75, []))

    def test_what_cannot_be(self):
        for line in (f"ovbd={DEVICE}", f"ovbd={DEVICE}:", "ovbd=sda1:a", f"ovbd={DEVICE}:a rw ovbd.cow=file"):
            status, calls = self.boot(line)
            self.assertEqual((status, calls), (1, []), line)
            self.assertIn("on the command line", ERROR.read_text())

    def test_what_ovbd_says_is_the_message(self):
        self.program("ovbd", "echo 'ovbd: a: cannot open: No such file or directory' >&2; exit 1\n")
        self.assertEqual(self.boot(f"ovbd={DEVICE}:a")[0], 1)
        self.assertEqual(ERROR.read_text(), "ovbd: a: cannot open: No such file or directory\n")


@unittest.skipUnless(os.geteuid() == 0 and DEVICE, "root and a block device are needed")
class RootState(Boot):
    def setUp(self):
        super().setUp()
        self.root = self.top / "root"
        for name in ("etc", "var", "root", "srv/data"):
            (self.root / name).mkdir(parents=True)
        self.place = pathlib.Path("/run/ovbd/state")
        self.addCleanup(lambda: subprocess.run(["rm", "-rf", self.place], check=True))

    def boot(self, line):
        """The exit status, and what was mounted where."""
        status, calls = self.run_script(STATE, line, self.root)
        return status, [call.split()[-1] for call in calls if call.startswith("mount ")]

    def overlays(self, *names):
        return [str(self.place), *(str(self.root / name) for name in names)]

    def test_not_wanted(self):
        self.assertEqual(self.boot("ovbd=/dev/vda:a root=/dev/mapper/root ro"), (0, []))

    def test_etc_and_var_if_nothing_else_is_named(self):
        self.assertEqual(self.boot(f"ovbd.state={DEVICE}"), (0, self.overlays("etc", "var")))
        self.assertTrue((self.place / "etc/upper").is_dir() and (self.place / "var/work").is_dir())

    def test_folders_that_are_named(self):
        self.assertEqual(self.boot(f"ovbd.state={DEVICE}:root,srv/data"), (0, self.overlays("root", "srv/data")))
        self.assertEqual((self.place / "root/upper").stat().st_mode & 0o777, 0o700)
        self.assertEqual((self.place / "srv/data/upper").stat().st_mode & 0o777, 0o755)

    def test_the_image_below_may_change(self):
        _, calls = self.run_script(STATE, f"ovbd.state={DEVICE}:etc", self.root)
        options, = (call.split()[4] for call in calls if call.startswith("mount -t overlay"))
        self.assertEqual(options.split(",")[:3], [f"lowerdir={self.root}/etc", f"upperdir={self.place}/etc/upper",
                                                  f"workdir={self.place}/etc/work"])
        self.assertTrue({"index=off", "metacopy=off", "redirect_dir=off"} <= set(options.split(",")))

    def test_a_device_may_come_later(self):
        self.assertEqual(self.boot("ovbd.state=LABEL=no-such"), (75, []))
        self.assertEqual(ERROR.read_text(), "ovbd: no device LABEL=no-such for what the machine writes\n")

    def test_what_cannot_be(self):
        for line, what in (("sda1", "is no device"), (f"{DEVICE}:", "is not ovbd.state=DEVICE"), (f"{DEVICE}:../etc", "is no folder"),
                           (f"{DEVICE}:/etc", "is no folder"), (f"{DEVICE}:opt", "has no folder /opt")):
            status, _ = self.boot(f"ovbd.state={line}")
            self.assertEqual(status, 1, line)
            self.assertIn(what, ERROR.read_text())

    def test_what_cannot_be_mounted(self):
        self.program("mount", "exit 1\n")
        self.assertEqual(self.boot(f"ovbd.state={DEVICE}")[0], 1)
        self.assertEqual(ERROR.read_text(), f"ovbd: cannot mount {DEVICE}\n")


if __name__ == "__main__":
    unittest.main()
