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
	hostonly='' instmods loop dm-snapshot dm-overlaybd dm-zfile dm-verity overlay
}

install() {
	inst_multiple ovbd wipefs blkid cat mkdir mount umount
	local name
	for name in boot-functions root-stack root-state; do
		inst_simple "/usr/lib/ovbd/$name"
	done
	inst_rules 09-ovbd.rules
	# Which images of the store are taken, and with what signatures are checked.
	if [ -e /etc/ovbd/policy.conf ]; then
		inst_multiple openssl
		inst_simple /etc/ovbd/policy.conf
		local word
		for word in $(grep -v '^[[:space:]]*#' /etc/ovbd/policy.conf); do
			case $word in /*) inst_simple "$word" ;; esac
		done
	fi
	inst_hook initqueue/settled 10 "$moddir/ovbd-settled.sh"
	inst_hook initqueue/timeout 10 "$moddir/ovbd-timeout.sh"
	inst_hook pre-pivot 10 "$moddir/ovbd-state.sh"
}
