#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Suspend, resume and table reload under load, and the lifetime of the module.

. "$(dirname "$0")/../lib/shell.sh"

check "module loads" load_module selftests/dm-linear-twin/dm-rust-linear
use_loop lower 2M
len=$(sectors $lower)

hooks() {
	dmsetup status t-rust | cut -d' ' -f7-11
}

# presuspend presuspend_undo postsuspend preresume resume
dm_create t-rust "0 $len rust-linear $lower 0"
check_eq "hooks after creation" "0 0 0 1 1" "$(hooks)"
dmsetup suspend t-rust
check_eq "hooks after suspend" "1 0 1 1 1" "$(hooks)"
dm_resume t-rust
check_eq "hooks after resume" "1 0 1 2 2" "$(hooks)"

dd if=$dm/t-rust of=$work/data bs=64k iflag=direct status=none
dmsetup suspend t-rust
dd if=$dm/t-rust of=$work/late bs=64k iflag=direct status=none &
reader=$!
sleep 1
check "a reader waits while suspended" kill -0 $reader
dm_resume t-rust
check "and reads after resume" wait $reader
check "the same data" cmp $work/data $work/late

dmsetup suspend t-rust
dmsetup message t-rust 0 fail_resume
check_fails "preresume refuses" dm_resume t-rust
check_eq "the device stays suspended" SUSPENDED \
	"$(dmsetup info -c --noheadings -o suspended t-rust | tr a-z A-Z)"
check "and resumes later" dm_resume t-rust
dm_remove t-rust

# Bios that ended while the device is suspended without flushing come back after
# the table was replaced.
modprobe dm-delay
dm_create t-slow "0 $len delay $lower 0 2000"
dm_create t-rust "0 $len rust-linear $dm/t-slow 0 2 requeue 1000"
dd if=$dm/t-rust of=$work/late bs=64k count=1 iflag=direct status=none &
reader=$!
sleep 1
dmsetup suspend --noflush --nolockfs t-rust
dmsetup reload t-rust --table "0 $len rust-linear $lower 0"
dm_resume t-rust
check "a requeued bio goes through the next table" wait $reader
check "with its data" cmp -n 65536 $work/data $work/late
dm_remove t-rust
dm_remove t-slow

# Tables of all kinds replace each other while somebody reads and writes.
dm_create t-rust "0 $len rust-linear $lower 0"
load() {
	for pass in 1 2 3 4 5 6; do
		dd if=$work/data of=$dm/t-rust bs=16k oflag=direct status=none || return 1
		dd if=$dm/t-rust bs=32k iflag=direct status=none | cmp - $work/data || return 1
	done
}
load &
loader=$!
reloads=0
while kill -0 $loader 2>/dev/null; do
	for table in "linear $lower 0" "rust-linear $lower 0 3 split 3 queue" \
		"rust-linear $lower 0 1 defer" "rust-linear $lower 0 2 split 16"; do
		dmsetup reload t-rust --table "0 $len $table" &&
			dmsetup suspend t-rust && dm_resume t-rust || break 2
		reloads=$((reloads + 1))
	done
done
check "load runs through table reloads" wait $loader
check "which all worked, at least four" test $reloads -ge 4
echo "# $reloads reloads"
dm_remove t-rust

# The module is in use as long as there is a target, active or not.
dm_create t-rust "0 8 rust-linear $lower 0"
check_fails "active target: module cannot be unloaded" rmmod dm_rust_linear
dmsetup suspend t-rust
check_fails "suspended target: module cannot be unloaded" rmmod dm_rust_linear
dm_resume t-rust
dmsetup reload t-rust --table "0 8 linear $lower 0"
dmsetup suspend t-rust
dm_resume t-rust
check "target replaced: module unloads" rmmod dm_rust_linear
check "and loads again" load_module selftests/dm-linear-twin/dm-rust-linear
dmsetup reload t-rust --table "0 8 rust-linear $lower 0"
check_fails "target only loaded: module cannot be unloaded" rmmod dm_rust_linear
dmsetup clear t-rust
check "table cleared: module unloads" rmmod dm_rust_linear
dm_remove t-rust

# A constructor that fails leaves nothing behind.
check "loads again" load_module selftests/dm-linear-twin/dm-rust-linear
for i in 1 2 3; do
	dm_create t-bad "0 8 rust-linear $lower 0 1 unknown" 2>/dev/null
	dmsetup info t-bad >/dev/null 2>&1 && dm_remove t-bad
done
check_eq "no device remains" 0 "$(dmsetup ls | grep -c t-)"
check "module unloads after failed constructors" rmmod dm_rust_linear

klog_mark
load_module selftests/dm-linear-twin/dm-rust-linear
check_fails "the module cannot be loaded twice" \
	insmod $KO_DIR/selftests/dm-linear-twin/dm-rust-linear.ko
rmmod dm_rust_linear
check_eq "no warning in the log" "" "$(klog | grep -E 'WARNING|BUG|Oops')"

done_testing
