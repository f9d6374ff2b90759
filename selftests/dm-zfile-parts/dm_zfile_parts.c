// SPDX-License-Identifier: GPL-2.0
/*
 * What reading a ZFile costs at least: the CRC-32C and the decompression of
 * all its blocks, from memory to memory, without a device or a request. For
 * lz4 also with the kernel's decoder.
 *
 * The module measures while it is loaded, leaves the results in its parameters
 * and is then of no further use. It trusts the file: for benchmarks only.
 *
 * By the clock, what else the machine does adds to a measurement. So a stretch
 * of blocks can be decompressed several times, by the decoders in turn, of
 * which the shortest counts.
 */

#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/lz4.h>
#include <linux/module.h>
#include <linux/unaligned.h>
#include <linux/vmalloc.h>
#include <linux/zstd.h>

#include "decoders.h"

#define HEADER_BYTES 512
#define CRC_BYTES 4
#define STRETCH_BYTES (1 << 20)

static char *path;
module_param(path, charp, 0444);
MODULE_PARM_DESC(path, "The ZFile, or a device that starts with it");
static ulong index_offset;
module_param(index_offset, ulong, 0444);
MODULE_PARM_DESC(index_offset, "Byte of the file at which its jump table starts");
static uint blocks;
module_param(blocks, uint, 0444);
MODULE_PARM_DESC(blocks, "Number of blocks");
static uint block_bytes;
module_param(block_bytes, uint, 0444);
MODULE_PARM_DESC(block_bytes, "Bytes of a block before compression, all of them equal");
static bool zstd;
module_param(zstd, bool, 0444);
MODULE_PARM_DESC(zstd, "The file is compressed with zstd instead of lz4");
static bool crc;
module_param(crc, bool, 0444);
MODULE_PARM_DESC(crc, "A CRC follows each block");

static uint rounds = 1;
module_param(rounds, uint, 0444);
MODULE_PARM_DESC(rounds, "How often each stretch of blocks is decompressed");

static ulong crc_ns;
module_param(crc_ns, ulong, 0444);
MODULE_PARM_DESC(crc_ns, "Result: nanoseconds for all CRCs");
static ulong decode_ns;
module_param(decode_ns, ulong, 0444);
MODULE_PARM_DESC(decode_ns, "Result: nanoseconds for all decompressions");
static ulong kernel_decode_ns;
module_param(kernel_decode_ns, ulong, 0444);
MODULE_PARM_DESC(kernel_decode_ns, "Result: the same with the kernel's lz4");

static void *read_all(size_t size)
{
	struct file *file;
	loff_t at = 0;
	void *data;

	file = filp_open(path, O_RDONLY | O_LARGEFILE, 0);
	if (IS_ERR(file))
		return file;
	data = vmalloc(size);
	while (data && at < size) {
		ssize_t count = kernel_read(file, data + at, size - at, &at);

		if (count <= 0) {
			vfree(data);
			data = ERR_PTR(count ?: -ENODATA);
			break;
		}
	}
	filp_close(file, NULL);
	return data ?: ERR_PTR(-ENOMEM);
}

enum decoder { LZ4, KERNEL_LZ4, ZSTD };

/* Decompresses blocks, and notes how long that takes if it is the least. */
static int decode(const u8 *data, const u8 *block, uint first, uint end,
		  u8 *output, zstd_dctx *dctx, enum decoder decoder, s64 *least)
{
	const u8 *index = data + index_offset;
	ktime_t start;
	uint i;
	s64 ns;

	start = ktime_get();
	for (i = first; i < end; i++) {
		u32 stored = get_unaligned_le32(index + 4 * i);
		u32 length = stored - (crc ? CRC_BYTES : 0);
		size_t count;

		if (decoder == ZSTD)
			count = zstd_decompress_dctx(dctx, output, block_bytes,
						     block, length);
		else if (decoder == KERNEL_LZ4)
			count = LZ4_decompress_safe(block, output, length,
						    block_bytes);
		else
			/* The jump table follows the last block. */
			count = zfile_lz4_decompress(block, index + 4 - block,
						     length, output,
						     block_bytes);
		if (count != block_bytes)
			return -EBADMSG;
		block += stored;
	}
	ns = ktime_to_ns(ktime_sub(ktime_get(), start));
	*least = min(*least, ns);
	return 0;
}

/* Decompresses all blocks, a stretch at a time. */
static int decode_all(const u8 *data, u8 *output, zstd_dctx *dctx)
{
	uint step = max(STRETCH_BYTES / block_bytes, 1u);
	const u8 *index = data + index_offset;
	const u8 *block = data + HEADER_BYTES;
	uint first, end, round, i;
	int ret = 0;

	for (first = 0; first < blocks; first = end) {
		s64 least = S64_MAX, kernel_least = S64_MAX;

		end = min(first + step, blocks);
		for (round = 0; round < rounds && !ret; round++) {
			ret = decode(data, block, first, end, output, dctx,
				     zstd ? ZSTD : LZ4, &least);
			if (!ret && !zstd)
				ret = decode(data, block, first, end, output,
					     dctx, KERNEL_LZ4, &kernel_least);
		}
		if (ret || !rounds)
			return ret ?: -EINVAL;
		decode_ns += least;
		if (!zstd)
			kernel_decode_ns += kernel_least;
		for (i = first; i < end; i++)
			block += get_unaligned_le32(index + 4 * i);
	}
	return 0;
}

static int check(const u8 *data)
{
	const u8 *index = data + index_offset;
	const u8 *block = data + HEADER_BYTES;
	ktime_t start;
	uint i;

	start = ktime_get();
	for (i = 0; crc && i < blocks; i++) {
		u32 length = get_unaligned_le32(index + 4 * i) - CRC_BYTES;

		/* The seed with which the original implementation starts. */
		if (zfile_crc32c(100007, block, length) !=
		    get_unaligned_le32(block + length))
			return -EBADMSG;
		block += length + CRC_BYTES;
	}
	crc_ns = ktime_to_ns(ktime_sub(ktime_get(), start));
	return 0;
}

static int measure(const u8 *data, u8 *output, zstd_dctx *dctx)
{
	int ret = check(data);

	return ret ?: decode_all(data, output, dctx);
}

static int __init parts_init(void)
{
	size_t workspace_bytes = zstd_dctx_workspace_bound();
	void *workspace = vmalloc(workspace_bytes);
	/* From the linear mapping, as the pages of a request are. */
	u8 *output = kmalloc(block_bytes, GFP_KERNEL);
	int ret = -ENOMEM;
	void *data;

	if (workspace && output) {
		data = read_all(index_offset + 4 * (size_t)blocks);
		ret = PTR_ERR_OR_ZERO(data);
		if (!ret) {
			ret = measure(data, output, zstd_init_dctx(workspace, workspace_bytes));
			vfree(data);
		}
	}
	kfree(output);
	vfree(workspace);
	return ret;
}

static void __exit parts_exit(void)
{
}

module_init(parts_init);
module_exit(parts_exit);
MODULE_DESCRIPTION("CRC-32C and decompression of a ZFile, for the benchmark");
MODULE_AUTHOR("dm-overlaybd maintainers");
MODULE_LICENSE("GPL");
