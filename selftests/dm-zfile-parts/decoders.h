/* SPDX-License-Identifier: GPL-2.0 */
/* What decoders.rs has for C: the codecs of dm-zfile that are not the kernel's. */

#ifndef _DM_ZFILE_PARTS_DECODERS_H
#define _DM_ZFILE_PARTS_DECODERS_H

#include <linux/types.h>

/*
 * Decompresses the block of `len` bytes that `readable` bytes from `src` on
 * begin with. Returns `dst_len`, or 0 if the block is another.
 */
size_t zfile_lz4_decompress(const u8 *src, size_t readable, size_t len,
			    u8 *dst, size_t dst_len);
u32 zfile_crc32c(u32 seed, const u8 *data, size_t len);

#endif /* _DM_ZFILE_PARTS_DECODERS_H */
