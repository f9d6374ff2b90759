#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# What an administrator sees of a target: table, status, messages, limits, and the
# error for each kind of bad table line.

. "$(dirname "$0")/../lib/shell.sh"

check "module loads" load_module selftests/dm-linear-twin/dm-rust-linear

use_loop lower 2M
use_loop lower4k 2M -b 4096
dev=$(devno $lower)

check "table with all options loads" dm_create t-rust "0 2048 rust-linear $lower 16 \
	15 split 8 queue requeue 3 io_opt 65536 max_io_len 64 read 0 512 read 1 4096"
table=$(dmsetup table t-rust)
check_eq "table names the device by number and lists the options" \
	"0 2048 rust-linear $dev 16 15 split 8 queue requeue 3 io_opt 65536 max_io_len 64 read 0 512 read 1 4096" \
	"$table"
dm_remove t-rust

# Tables reload verbatim, with and without options.
for opts in "" "1 defer" "2 fail medium" "2 fail drop" "3 read 100 5000" "4 io_opt 8192 split 1"; do
	dm_create t-rust "0 2048 rust-linear $lower 16 $opts"
	table=$(dmsetup table t-rust)
	dmsetup reload t-rust --table "$table"
	dm_resume t-rust
	check_eq "reloads verbatim: '$opts'" "$table" "$(dmsetup table t-rust)"
	dm_remove t-rust
done

dm_create t-rust "0 2048 rust-linear $lower 16 2 io_opt 65536"
check_like "status has eight counters" '0 2048 rust-linear( [0-9]+){8}' "$(dmsetup status t-rust)"
check_eq "IMA measurement" \
	"0 2048 rust-linear target_name=rust-linear,target_version=1.2.3,device_name=$dev,start=16;" \
	"$(dmsetup measure t-rust)"
check_eq "device is a dependency" "1 dependencies : ($(echo $dev | tr : ' ' | sed 's/ /, /'))" \
	"$(dmsetup deps t-rust | sed 's/[[:space:]]\+/ /g')"
check_eq "io_opt is in the limits" 65536 \
	"$(cat /sys/block/$(sysname $dm/t-rust)/queue/optimal_io_size)"

check_eq "message with a reply" "one two three" "$(dmsetup message t-rust 0 echo one two three)"
long=$(printf 'word%04d ' $(seq 4000))
check_eq "reply of 36 kB is complete" "${long% }" "$(dmsetup message t-rust 0 echo $long)"
check_eq "message without a reply" "" "$(dmsetup message t-rust 0 reset)"
check_fails "unknown message" dmsetup message t-rust 0 unknown
check_fails "message with too many arguments" dmsetup message t-rust 0 reset now
dm_remove t-rust

# Status longer than the first buffer of dmsetup: 200 checksums and a table of 4 kB
reads=$(printf 'read %d 512 ' $(seq 1000 1199))
dm_create t-rust "0 8 rust-linear $lower 0 600 $reads"
check_eq "200 checksums in the status" 211 "$(dmsetup status t-rust | wc -w)"
check_eq "200 reads in the table" "0 8 rust-linear $dev 0 600 ${reads% }" "$(dmsetup table t-rust)"
dm_remove t-rust

# bad MESSAGE TABLE: refused, and the log says why
bad() {
	bad_message=$1
	shift
	klog_mark
	if dm_create t-bad "$*" >$work/out 2>&1; then
		not_ok "refused: $*"
		dm_remove t-bad
	else
		check_klog "refused: $*" "rust-linear: $bad_message"
	fi
	dmsetup info t-bad >/dev/null 2>&1 && dm_remove t-bad
}

n="0 8 rust-linear"
bad "Missing device (-EINVAL)" "$n"
bad "Invalid device sector (-EINVAL)" "$n $lower"
bad "Invalid device sector (-EINVAL)" "$n $lower -1"
bad "Invalid device sector (-EINVAL)" "$n $lower +1"
bad "Invalid device sector (-EINVAL)" "$n $lower 0x1"
bad "Invalid device sector (-EINVAL)" "$n $lower 1x"
bad "Invalid device sector (-EINVAL)" "$n $lower 1.0"
bad "Invalid device sector (-EINVAL)" "$n $lower 18446744073709551616"
bad "Invalid device sector (-EINVAL)" "$n $lower 99999999999999999999999999"
bad "Device lookup failed (-ENOENT)" "$n /dev/nonexistent 0"
bad "Device lookup failed" "$n 99:99 0"
bad "/dev/nonexistent: cannot open: ENOENT" "$n /dev/nonexistent 0"
bad "Device lookup failed" "$n /dev/null 0"
bad "Invalid number of optional arguments (-EINVAL)" "$n $lower 0 x"
bad "Invalid number of optional arguments (-EINVAL)" "$n $lower 0 -1"
bad "Invalid number of optional arguments (-EINVAL)" "$n $lower 0 1001"
bad "Not enough arguments in group (-EINVAL)" "$n $lower 0 1"
bad "Not enough arguments in group (-EINVAL)" "$n $lower 0 3 split 8"
bad "Too many arguments (-EINVAL)" "$n $lower 0 1 defer defer"
bad "Too many arguments (-EINVAL)" "$n $lower 0 0 defer"
bad "Unrecognised optional argument (-EINVAL)" "$n $lower 0 1 unknown"
bad "Invalid split size (-EINVAL)" "$n $lower 0 1 split"
bad "Invalid split size (-EINVAL)" "$n $lower 0 2 split 4294967296"
bad "Missing status (-EINVAL)" "$n $lower 0 1 fail"
bad "Invalid status (-EINVAL)" "$n $lower 0 2 fail well"
bad "Invalid maximum I/O length (-EINVAL)" "$n $lower 0 2 max_io_len 4294967296"
bad "Table must be read-only (dmsetup create --readonly) (-EINVAL)" "$n $lower 0 1 readonly"
check "loads read-only" dm_create t-rust "$n $lower 0 1 readonly" --readonly
check_eq "device is read-only" 1 "$(blockdev --getro $dm/t-rust)"
dm_remove t-rust

# iterate_devices: device mapper knows what is used
too_small() {
	klog_mark
	dm_create t-bad "$1" >$work/out 2>&1 && dm_remove t-bad
	dmsetup info t-bad >/dev/null 2>&1 && dm_remove t-bad
	check_klog "refused: $1" "too small for target"
}
size=$(sectors $lower)
too_small "0 $((size + 1)) rust-linear $lower 0"
too_small "0 $size rust-linear $lower 1"
too_small "0 1 rust-linear $lower $size"
too_small "0 8 rust-linear $lower 18446744073709551608"
check "whole device" dm_create t-rust "0 $size rust-linear $lower 0"
dm_remove t-rust

klog_mark
dm_create t-bad "0 8 rust-linear $lower4k 1" >$work/out 2>&1 && dm_remove t-bad
dmsetup info t-bad >/dev/null 2>&1 && dm_remove t-bad
check_klog "refused: start is not a multiple of the logical block" \
	"not aligned to h/w logical block size 4096"
dm_create t-rust "0 8 rust-linear $lower4k 8"
check_eq "logical block size of the device" 4096 "$(blockdev --getss $dm/t-rust)"
dm_remove t-rust

check "module unloads" rmmod dm_rust_linear
check "module loads with a parameter" \
	load_module selftests/dm-linear-twin/dm-rust-linear max_reads=1
check "one read" dm_create t-rust "$n $lower 0 3 read 0 1"
dm_remove t-rust
bad "Too many read options (-EINVAL)" "$n $lower 0 6 read 0 1 read 0 1"
check_eq "nothing is left open" "" "$(lsblk -no NAME $lower | sed 1d)"

done_testing
