#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# dracut: puts ovbd and the modules that a stack of layers needs into an initramfs.

check() {
	require_binaries ovbd wipefs
}

depends() {
	echo dm
}

installkernel() {
	# Also where this system does not run from a stack.
	hostonly='' instmods loop dm-snapshot dm-overlaybd dm-zfile
}

install() {
	inst_multiple ovbd wipefs blkid cat mkdir mount
	inst_simple /usr/lib/ovbd/root-stack
	inst_hook initqueue/settled 10 "$moddir/ovbd-settled.sh"
	inst_hook initqueue/timeout 10 "$moddir/ovbd-timeout.sh"
}
