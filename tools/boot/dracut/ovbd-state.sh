#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# dracut: puts what the machine writes over folders of the root file system. Its device may still come.
tries=60
until /usr/lib/ovbd/root-state "$NEWROOT" 2>/dev/null; do
	if [ $? != 75 ] || [ $tries = 0 ]; then
		emergency_shell -n ovbd "$(cat /run/ovbd/error)"
		break
	fi
	tries=$((tries - 1))
	sleep 1
done
