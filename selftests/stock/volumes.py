#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A thin volume and a classic one go to another volume group and back, with the kernel that users have: of lvm/series as much as
the emulator can do in a minute. OVBD_SNAPSHOTS asks for more of each."""

import os
import pathlib
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from test_script import Tap, load
from volume_series import series

COUNT = int(os.environ.get("OVBD_SNAPSHOTS", "4"))
tap = Tap()
# What the other kernels have built in.
load("loop", "dm-snapshot", "dm-thin-pool")
series(tap, thin=COUNT, turn=max(COUNT // 4, 1), classic=COUNT // 2, back=COUNT // 4)
tap.finish()
