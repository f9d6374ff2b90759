#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# I/O through the self-test target is what it is through dm-linear, in all ways that
# a target can answer a bio.

. "$(dirname "$0")/../lib/shell.sh"

check "module loads" load_module selftests/dm-linear-twin/dm-rust-linear
check_like "target is registered" 'rust-linear +v1\.2\.3' \
	"$(dmsetup targets | grep rust-linear)"

use_loop lower 2M
start=77
len=$(($(sectors $lower) - start - 5))
dm_create t-linear "0 $len linear $lower $start"

new() {
	dm_create t-rust "0 $len rust-linear $lower $start $*"
}

# same [BLOCK SIZE]: both devices hold the same
same() {
	cmp <(dd if=$dm/t-rust bs=${1:-64k} iflag=direct status=none) \
	    <(dd if=$dm/t-linear bs=64k status=none)
}

counters() {
	dmsetup status t-rust | cut -d' ' -f4-6
}

balanced() {
	set -- $(counters)
	[ "$1" -gt 0 ] && [ "$1" = "$2" ] && [ "$2" = "$3" ]
}

# written [BLOCK SIZE]: what is written here can be read there
written() {
	head -c $((len * 512)) /dev/urandom >$work/data
	dd if=$work/data of=$dm/t-rust bs=${1:-512k} oflag=direct status=none
	blockdev --flushbufs $dm/t-linear
	cmp $work/data $dm/t-linear
}

new
check "reads equal dm-linear's" same
check "reads of one sector equal dm-linear's" same 512
check "writes arrive" written
check "each bio has ended, with its data" balanced
dm_remove t-rust

for split in 1 3 8 100; do
	new 2 split $split
	check "split at $split: reads" same 1M
	check "split at $split: writes" written 1M
	dm_remove t-rust
done

# bios COMMAND: how many bios the target gets for it
bios() {
	dmsetup message t-rust 0 reset
	"$@"
	counters | cut -d' ' -f1
}

# 1 MiB in bios of at most 8 sectors
new 2 split 8
check_eq "split at 8: number of bios" 256 \
	"$(bios dd if=$dm/t-rust of=/dev/null bs=1M count=1 iflag=direct status=none)"
dm_remove t-rust

new 2 max_io_len 16
check_eq "max_io_len 16: number of bios" 128 \
	"$(bios dd if=$dm/t-rust of=/dev/null bs=1M count=1 iflag=direct status=none)"
dm_remove t-rust

for way in defer queue; do
	new 1 $way
	check "$way: reads" same
	check "$way: writes" written
	check "$way: each bio has ended, with its data" balanced
	dm_remove t-rust
done

new 1 zero
check "zero: reads are zeroes" \
	cmp -n $((len * 512)) $dm/t-rust /dev/zero
dm_remove t-rust

for status in kill ioerr medium drop; do
	new 2 fail $status
	check_fails "fail $status: read fails" \
		dd if=$dm/t-rust of=/dev/null bs=4k count=1 iflag=direct
	dm_remove t-rust
done

# Two targets in one device: each sees its own sectors.
half=$((len / 2 / 8 * 8))
dm_create t-rust <<EOF
0 $half rust-linear $lower $start 2 split 7
$half $((len - half)) rust-linear $lower $((start + half)) 1 queue
EOF
check "two targets: reads" same 1M
check "two targets: writes" written 1M
check_eq "flush reaches the target" 0 \
	"$(dd if=/dev/zero of=$dm/t-rust bs=4k count=1 conv=fsync status=none; echo $?)"
dm_remove t-rust

dm_remove t-linear
check "module unloads" rmmod dm_rust_linear

done_testing
