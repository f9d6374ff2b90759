/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Inline functions and macros of the C headers, as functions that Rust can call.
 */

#ifndef _DM_RUST_HELPERS_H
#define _DM_RUST_HELPERS_H

#include <crypto/blake2s.h>
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/mempool.h>
#include <linux/workqueue.h>

void rust_helper_bio_set_dev(struct bio *bio, struct block_device *bdev);
void rust_helper_zero_fill_bio(struct bio *bio);
struct bio_vec rust_helper_bio_iter_iovec(const struct bio *bio,
					  const struct bvec_iter *iter);
struct bio_vec rust_helper_mp_bvec_iter_bvec(const struct bio *bio,
					     const struct bvec_iter *iter);
void rust_helper_bio_advance_iter(const struct bio *bio,
				  struct bvec_iter *iter, unsigned int bytes);
void *rust_helper_bvec_kmap_local(const struct bio_vec *bvec);
void rust_helper_kunmap_local(const void *addr);
void rust_helper_bvec_flush_dcache(const struct bio_vec *bvec);
unsigned int rust_helper_bdev_logical_block_size(struct block_device *bdev);
sector_t rust_helper_bdev_nr_sectors(struct block_device *bdev);
void rust_helper_blake2s_init(struct blake2s_ctx *ctx, size_t outlen);
void rust_helper_init_completion(struct completion *x);
void rust_helper_init_dm_work(struct work_struct *work, work_func_t func);
struct workqueue_struct *rust_helper_alloc_dm_workqueue(const char *name);
int rust_helper_dm_printk_ratelimit(void);
void *rust_helper_kmalloc_nowait(size_t size);
mempool_t *rust_helper_mempool_create_kmalloc_pool(int min_nr, size_t size);
void *rust_helper_mempool_alloc_noio(mempool_t *pool);
unsigned int rust_helper_num_online_cpus_now(void);
bool rust_helper_cpu_is_online(unsigned int cpu);
struct task_struct *rust_helper_current_task(void);
bool rust_helper_task_may_work_here(const struct task_struct *task);
int rust_helper_dm_register_target(struct target_type *type);

#endif /* _DM_RUST_HELPERS_H */
