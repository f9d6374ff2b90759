/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Inline functions and macros of the C headers, as functions that Rust can call.
 */

#ifndef _DM_RUST_HELPERS_H
#define _DM_RUST_HELPERS_H

#include <crypto/blake2s.h>
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/dax.h>
#include <linux/device-mapper.h>
#include <linux/percpu_counter.h>
#include <linux/workqueue.h>

void rust_helper_bio_set_dev(struct bio *bio, struct block_device *bdev);
void rust_helper_zero_fill_bio(struct bio *bio);
struct bio_vec rust_helper_bio_iter_iovec(const struct bio *bio,
					  const struct bvec_iter *iter);
struct bio_vec rust_helper_mp_bvec_iter_bvec(const struct bio *bio,
					     const struct bvec_iter *iter);
void rust_helper_bio_advance_iter(const struct bio *bio,
				  struct bvec_iter *iter, unsigned int bytes);
void rust_helper_copy_to_shared(void *to, const void *from, size_t len);
void rust_helper_zero_shared(void *to, size_t len);
void *rust_helper_bvec_kmap_local(const struct bio_vec *bvec);
void rust_helper_bvec_flush_dcache(const struct bio_vec *bvec);
unsigned int rust_helper_bdev_logical_block_size(struct block_device *bdev);
sector_t rust_helper_bdev_nr_sectors(struct block_device *bdev);
struct dax_device *rust_helper_dax_device_get(struct block_device *bdev, u64 *start);
void rust_helper_dax_device_put(struct dax_device *dax);
long rust_helper_dax_device_access(struct dax_device *dax, pgoff_t page, long pages,
				   enum dax_access_mode mode, void **kaddr,
				   unsigned long *pfn);
void rust_helper_dax_claims_lock(void);
void rust_helper_dax_claims_unlock(void);
void rust_helper_blake2s_init(struct blake2s_ctx *ctx, size_t outlen);
void rust_helper_init_dm_work(struct work_struct *work, work_func_t func);
struct workqueue_struct *rust_helper_alloc_dm_workqueue(const char *name);
int rust_helper_dm_printk_ratelimit(void);
void *rust_helper_alloc_read_buffer(size_t size, bool contiguous, bool wait);
void rust_helper_invalidate_read_buffer(void *addr, int size);
struct workqueue_struct *rust_helper_alloc_lower_read_workqueue(void);
void rust_helper_lower_read_lock(void);
void rust_helper_lower_read_unlock(void);
int rust_helper_percpu_counters_init(struct percpu_counter *list, u32 count);
void rust_helper_percpu_counters_destroy(struct percpu_counter *list, u32 count);
void rust_helper_percpu_counter_count(struct percpu_counter *counter, s64 count);
s64 rust_helper_percpu_counter_total(struct percpu_counter *counter);
unsigned int rust_helper_num_online_cpus_now(void);
unsigned long rust_helper_jiffies_now(void);
bool rust_helper_task_may_work_here(const struct task_struct *task);
int rust_helper_dm_register_target(struct target_type *type);
bool rust_helper_crc32c_has_one_stream(void);

#endif /* _DM_RUST_HELPERS_H */
