#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The demo's part inside the guest: loads both modules into the stock kernel and lists device-mapper's targets.
set -e
cd "$(dirname "$0")/.."
modprobe dm-mod
insmod dm-overlaybd/dm-overlaybd.ko
insmod dm-zfile/dm-zfile.ko
echo "kernel: $(uname -rv)"
dmsetup targets
