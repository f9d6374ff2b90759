#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Reads of constructors: any range of bytes, any logical block size, many at once,
# and devices that fail.

. "$(dirname "$0")/../lib/shell.sh"

check "module loads" load_module selftests/dm-linear-twin/dm-rust-linear

size=$((2 << 20))
use_loop lower $size
use_loop lower4k $size -b 4096
dd if=$lower of=$lower4k bs=64k status=none
blockdev --flushbufs $lower4k

# crcs DEVICE OPTIONS: the checksums that a constructor got
crcs() {
	crcs_dev=$1
	shift
	dm_create t-rust "0 8 rust-linear $crcs_dev 0 $# $*" || return 1
	dmsetup status t-rust | cut -d' ' -f12-
	dm_remove t-rust
}

# The checksum of a known text, wherever it is.
reads=
want=
for offset in 0 11 505 1019 4090 65536 131069 $((size - 9)); do
	for dev in $lower $lower4k; do
		printf 123456789 | dd of=$dev bs=1 seek=$offset conv=notrunc status=none
	done
	reads="$reads read $offset 9"
	want="$want e3069283"
done
blockdev --flushbufs $lower $lower4k
check_eq "nine bytes at odd places" "${want# }" "$(crcs $lower $reads)"
check_eq "the same with blocks of 4096 bytes" "${want# }" "$(crcs $lower4k $reads)"

# The same bytes give the same checksum: cut out of the device they are at the start of
# another one.
for range in "1 130000" "511 131073" "4095 262145" "77 1234567" "0 $size"; do
	set -- $range
	rm -f $work/part
	dd if=$lower of=$work/part bs=64k iflag=skip_bytes,count_bytes skip=$1 count=$2 status=none
	truncate -s %512 $work/part
	part=$(losetup -f --show $work/part)
	want=$(crcs $part read 0 $2)
	losetup -d $part
	check_eq "$2 bytes at $1" "$want $want" \
		"$(crcs $lower read $1 $2) $(crcs $lower4k read $1 $2)"
done

check_eq "nothing at all" "00000000" "$(crcs $lower read 5 0)"
check_eq "one byte too far: EINVAL" "-22" "$(crcs $lower read $((size - 8)) 9)"
check_eq "far away: EINVAL" "-22 -22" \
	"$(crcs $lower read 18446744073709551615 1 read 18446744073709551615 9)"

# More requests than fit into flight at once, in disorder, one of them wrong
reads=
for i in $(seq 0 79); do
	reads="$reads read $((i * 7919 % 100 * 20000)) 20001"
done
batch=$(crcs $lower $reads read $size 1)
check_eq "batch of 81 requests" 81 "$(echo $batch | wc -w)"
set -- $batch
check_eq "first of the batch" "$(crcs $lower read 0 20001)" "$1"
check_eq "forty-fourth of the batch" \
	"$(crcs $lower read $((43 * 7919 % 100 * 20000)) 20001)" "${44}"
check_eq "the wrong one" "-22" "${81}"

# A device with a bad place: only what touches it fails.
dm_create t-hole <<EOF
0 2048 linear $lower 0
2048 8 error
2056 2040 linear $lower 2056
EOF
good=$(crcs $lower read 0 1048576)
check_eq "bad sectors: only their requests fail" "$good -5 -5 $(crcs $lower read 1052672 512)" \
	"$(crcs $dm/t-hole read 0 1048576 read 1048576 1 read 1000000 100000 read 1052672 512)"
dm_remove t-hole

# Requests overlap: 60 of them on a device that takes half a second for each.
modprobe dm-delay
dm_create t-slow "0 4096 delay $lower 0 500"
start=$(date +%s)
check "slow device" crcs $dm/t-slow $(for i in $(seq 60); do echo "read $((i * 512)) 512"; done)
took=$(($(date +%s) - start))
dm_remove t-slow
echo "# 60 reads of 0.5 s took $took s"

done_testing
