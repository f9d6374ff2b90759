/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Header for which the bindings in this directory are generated. It lists what
 * the `bindings` crate of the kernel does not already include; which of the
 * names found here become Rust items is chosen in bindgen_parameters.
 *
 * Sorted alphabetically.
 */

#include <crypto/blake2s.h>
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/crc32.h>
#include <linux/dax.h>
#include <linux/device-mapper.h>
#include <linux/dm-io.h>
#include <linux/lz4.h>
#include <linux/percpu_counter.h>
#include <linux/vmalloc.h>
#include <linux/zstd.h>

#include "helpers.h"

/* `bindgen` gets confused at certain things. */
const gfp_t RUST_CONST_HELPER___GFP_RETRY_MAYFAIL = __GFP_RETRY_MAYFAIL;
const blk_mode_t RUST_CONST_HELPER_BLK_OPEN_READ = BLK_OPEN_READ;
const blk_mode_t RUST_CONST_HELPER_BLK_OPEN_WRITE = BLK_OPEN_WRITE;
const blk_status_t RUST_CONST_HELPER_BLK_STS_MEDIUM = BLK_STS_MEDIUM;
const blk_status_t RUST_CONST_HELPER_BLK_STS_IOERR = BLK_STS_IOERR;
const blk_opf_t RUST_CONST_HELPER_REQ_RAHEAD = REQ_RAHEAD;
const blk_opf_t RUST_CONST_HELPER_REQ_ATOMIC = REQ_ATOMIC;
const blk_opf_t RUST_CONST_HELPER_REQ_SYNC = REQ_SYNC;
const blk_opf_t RUST_CONST_HELPER_REQ_META = REQ_META;
const blk_opf_t RUST_CONST_HELPER_REQ_OP_MASK = REQ_OP_MASK;
const blk_opf_t RUST_CONST_HELPER_REQ_PRIO = REQ_PRIO;
const blk_opf_t RUST_CONST_HELPER_REQ_IDLE = REQ_IDLE;
