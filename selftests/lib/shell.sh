# SPDX-License-Identifier: GPL-2.0
#
# Shell functions shared by the tests: TAP output, backing devices, kernel log, and
# the removal of everything a test has made.
#
# A test is started as root in the VM with KO_DIR (where the modules were built), SRC
# (the top of the source) and TMPDIR (a tmpfs), and sources this file.

KO_DIR=${KO_DIR:-$PWD}
SRC=${SRC:-$PWD}
TMPDIR=${TMPDIR:-/tmp}

tap_count=0
tap_failed=0
tap_done=
work=$(mktemp -d "$TMPDIR/test.XXXXXX")
dm=$work/dm
mkdir "$dm"
loops=
modules=

# done_testing: the plan, which a test that breaks off does not print.
done_testing() {
	tap_done=yes
	echo "1..$tap_count"
}

ok() {
	tap_count=$((tap_count + 1))
	echo "ok $tap_count - $*"
}

not_ok() {
	tap_count=$((tap_count + 1))
	tap_failed=$((tap_failed + 1))
	echo "not ok $tap_count - $*"
}

skip() {
	tap_count=$((tap_count + 1))
	echo "ok $tap_count - $1 # SKIP $2"
}

# check DESCRIPTION COMMAND...: passes if the command succeeds.
check() {
	check_desc=$1
	shift
	if "$@" >"$work/out" 2>&1; then
		ok "$check_desc"
	else
		not_ok "$check_desc"
		sed 's/^/# /' "$work/out"
	fi
}

# check_fails DESCRIPTION COMMAND...: passes if the command fails.
check_fails() {
	check_desc=$1
	shift
	if "$@" >"$work/out" 2>&1; then
		not_ok "$check_desc"
		echo "# succeeded: $*"
	else
		ok "$check_desc"
	fi
}

# check_eq DESCRIPTION WANT GOT
check_eq() {
	if [ "$2" = "$3" ]; then
		ok "$1"
	else
		not_ok "$1"
		echo "# want: $2"
		echo "# got:  $3"
	fi
}

# check_like DESCRIPTION EXTENDED-REGEX GOT: the expression matches the whole.
check_like() {
	if printf '%s\n' "$3" | grep -Eqx -- "$2"; then
		ok "$1"
	else
		not_ok "$1"
		echo "# want: $2"
		echo "# got:  $3"
	fi
}

# Puts a mark into the kernel log; klog prints what came after it.
klog_mark() {
	klog_id=$$.$(date +%s%N)
	echo "selftests: mark $klog_id" >/dev/kmsg
}

klog() {
	dmesg | sed "1,/selftests: mark $klog_id/d"
}

# check_klog DESCRIPTION FIXED-STRING: it is in the log since the last mark.
check_klog() {
	if klog | grep -Fq -- "$2"; then
		ok "$1"
	else
		not_ok "$1"
		echo "# want: $2"
		klog | sed 's/^/# log: /'
	fi
}

# load_module PATH [PARAMETERS]: PATH is that below KO_DIR, without suffix.
load_module() {
	module=$(basename "$1" | tr - _)
	path=$1
	shift
	modprobe dm-mod || return 1
	for dep in $(modinfo -F depends "$KO_DIR/$path.ko" | tr , ' '); do
		modprobe "$dep" || return 1
	done
	insmod "$KO_DIR/$path.ko" "$@" && modules="$module $modules"
}

# loop_device SIZE [LOSETUP-OPTIONS]: prints a new loop device over a file of that size.
# The file is random unless the size ends in z: then it is empty.
loop_device() {
	modprobe loop
	loop_size=${1%z}
	loop_file=$(mktemp "$work/loop.XXXXXX")
	if [ "$loop_size" = "$1" ]; then
		head -c "$loop_size" /dev/urandom >"$loop_file"
	else
		truncate -s "$loop_size" "$loop_file"
	fi
	shift
	losetup -f --show "$@" "$loop_file"
}

# use_loop VARIABLE SIZE [LOSETUP-OPTIONS]: like loop_device, removed at the end.
use_loop() {
	loop_var=$1
	shift
	loop_new=$(loop_device "$@") || return 1
	loops="$loops $loop_new"
	eval "$loop_var=\$loop_new"
}

# sectors DEVICE: its size.
sectors() {
	blockdev --getsz "$1"
}

# major:minor of a device.
devno() {
	printf '%d:%d' "0x$(stat -Lc %t "$1")" "0x$(stat -Lc %T "$1")"
}

# name of a device in /sys/block
sysname() {
	basename "$(readlink -f "$1")"
}

# dm_create NAME [TABLE [DMSETUP-OPTIONS]]: the device is $dm/NAME, so nothing waits for
# udev. Without TABLE it comes from the standard input.
dm_create() {
	dm_name=$1
	dm_table=${2-$(cat)}
	shift
	[ $# -eq 0 ] || shift
	printf '%s\n' "$dm_table" |
		dmsetup create --noudevsync --noudevrules "$@" "$dm_name" || return 1
	ln -sf "/dev/$(dmsetup info -c --noheadings -o blkdevname "$dm_name")" "$dm/$dm_name"
}

# dm_remove NAME: udev may have the device open for a while, more so if it is slow.
dm_remove() {
	rm -f "$dm/$1"
	for dm_try in 1 2 3 4 5 6 7 8 9 10 11 12; do
		dmsetup remove --noudevsync "$1" 2>"$work/err" && return
		sleep 1
	done
	cat "$work/err" >&2
	return 1
}

# dm_resume NAME: also makes a table active that was loaded.
dm_resume() {
	dmsetup resume --noudevsync --noudevrules "$1"
}

cleanup() {
	status=$?
	trap - EXIT
	for name in $(dmsetup ls 2>/dev/null | awk '$1 ~ /^t-/ { print $1 }'); do
		dm_resume "$name" 2>/dev/null
	done
	wait
	# Devices on other devices go first.
	for try in 1 2 3 4 5; do
		for name in $(dmsetup ls 2>/dev/null | awk '$1 ~ /^t-/ { print $1 }'); do
			dmsetup remove --noudevsync --retry "$name" >/dev/null 2>&1
		done
	done
	for loop in $loops; do
		losetup -d "$loop"
	done
	for module in $modules; do
		grep -q "^$module " /proc/modules && rmmod "$module"
	done
	rm -rf "$work"
	[ "$tap_failed" -eq 0 ] && [ "$status" -eq 0 ] && [ "$tap_done" ]
	exit
}
trap cleanup EXIT
