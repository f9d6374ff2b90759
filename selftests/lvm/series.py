#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Twenty snapshots of a thin volume and twenty about a classic one, from one volume group to another and back."""

import pathlib
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from test_script import Tap
from volume_series import series

tap = Tap()
series(tap, thin=20, turn=5, classic=15, back=5)
tap.finish()
