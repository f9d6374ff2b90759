#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# dracut: tries to make the root device whenever udev has nothing to do. Only a missing device may still come.
/usr/lib/ovbd/root-stack 2>/dev/null
[ $? != 1 ] || emergency_shell -n ovbd "$(cat /run/ovbd/error)"
