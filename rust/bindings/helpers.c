// SPDX-License-Identifier: GPL-2.0
/*
 * Non-trivial C macros and inlined C functions cannot be called from Rust. The
 * helpers here wrap those that the device-mapper abstractions need and that the
 * kernel itself has no helper for.
 *
 * Each module includes this file into its own helpers.c, since an object belongs
 * to one module only.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/btf.h>
#include <linux/dax.h>
#include <linux/device-mapper.h>
#include <linux/highmem.h>
#include <linux/mutex.h>
#include <linux/percpu_counter.h>
#include <linux/ratelimit.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/utsname.h>
#include <linux/vmalloc.h>
#include <linux/version.h>

/* Trees in which no kernel was built may lack it. */
#if __has_include(<generated/utsversion.h>)
#include <generated/utsversion.h>
#endif

#include "helpers.h"

#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 3, 0)
/* As Linux 7.3 has it: whether a bio must not be completed here. */
static inline bool bio_in_atomic(void)
{
	if (IS_ENABLED(CONFIG_PREEMPTION) && rcu_preempt_depth())
		return true;
	if (!IS_ENABLED(CONFIG_PREEMPT_COUNT))
		return true;
	return !preemptible();
}
#endif

void rust_helper_bio_set_dev(struct bio *bio, struct block_device *bdev)
{
	bio_set_dev(bio, bdev);
}

void rust_helper_zero_fill_bio(struct bio *bio)
{
	zero_fill_bio(bio);
}

/* The part of the segment at `iter` that lies in one page. */
struct bio_vec rust_helper_bio_iter_iovec(const struct bio *bio,
					  const struct bvec_iter *iter)
{
	return bio_iter_iovec(bio, *iter);
}

/* The segment at `iter`: one or more physically contiguous pages. */
struct bio_vec rust_helper_mp_bvec_iter_bvec(const struct bio *bio,
					     const struct bvec_iter *iter)
{
	return mp_bvec_iter_bvec(bio->bi_io_vec, *iter);
}

void rust_helper_bio_advance_iter(const struct bio *bio,
				  struct bvec_iter *iter, unsigned int bytes)
{
	bio_advance_iter(bio, iter, bytes);
}

/*
 * Copies to pages that user space may read and write meanwhile. That is a race
 * as far as languages are concerned, in C too, but not for the kernel's memcpy()
 * and memset(): they store each byte and nothing else, and read nothing back.
 */
void rust_helper_copy_to_shared(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}

void rust_helper_zero_shared(void *to, size_t len)
{
	memset(to, 0, len);
}

void *rust_helper_bvec_kmap_local(const struct bio_vec *bvec)
{
	return bvec_kmap_local((struct bio_vec *)bvec);
}

/* What was written through the kernel mapping of a segment becomes visible. */
void rust_helper_bvec_flush_dcache(const struct bio_vec *bvec)
{
	struct page *page = bvec->bv_page + (bvec->bv_offset >> PAGE_SHIFT);
	unsigned int len = offset_in_page(bvec->bv_offset) + bvec->bv_len;

	if (!ARCH_IMPLEMENTS_FLUSH_DCACHE_PAGE)
		return;
	for (; len > PAGE_SIZE; len -= PAGE_SIZE)
		flush_dcache_page(page++);
	flush_dcache_page(page);
}

unsigned int rust_helper_bdev_logical_block_size(struct block_device *bdev)
{
	return bdev_logical_block_size(bdev);
}

sector_t rust_helper_bdev_nr_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

/* The memory behind a block device, and the byte of it at which that starts. */
struct dax_device *rust_helper_dax_device_get(struct block_device *bdev, u64 *start)
{
	return fs_dax_get_by_bdev(bdev, start, NULL, NULL);
}

void rust_helper_dax_device_put(struct dax_device *dax)
{
	fs_put_dax(dax, NULL);
}

long rust_helper_dax_device_access(struct dax_device *dax, pgoff_t page, long pages,
				   enum dax_access_mode mode, void **kaddr,
				   unsigned long *pfn)
{
#if IS_ENABLED(CONFIG_FS_DAX)
	return dax_direct_access(dax, page, pages, mode, kaddr, pfn);
#else
	return -EOPNOTSUPP;
#endif
}

static DEFINE_MUTEX(dax_claims_mutex);

void rust_helper_dax_claims_lock(void)
{
	mutex_lock(&dax_claims_mutex);
}

void rust_helper_dax_claims_unlock(void)
{
	mutex_unlock(&dax_claims_mutex);
}

void rust_helper_blake2s_init(struct blake2s_ctx *ctx, size_t outlen)
{
	blake2s_init(ctx, outlen);
}

void rust_helper_init_dm_work(struct work_struct *work, work_func_t func)
{
	INIT_WORK(work, func);
}

/* Work items in the path of I/O: few, short, and needed to get memory free. */
struct workqueue_struct *rust_helper_alloc_dm_workqueue(const char *name)
{
	return alloc_workqueue("dm-%s", WQ_MEM_RECLAIM | WQ_HIGHPRI | WQ_PERCPU,
			       0, name);
}

int rust_helper_dm_printk_ratelimit(void)
{
	static DEFINE_RATELIMIT_STATE(rs, DEFAULT_RATELIMIT_INTERVAL,
				      DEFAULT_RATELIMIT_BURST);

	return __ratelimit(&rs);
}

/*
 * Zeroed memory for a lower read, contiguous or made of pages. At once or not at
 * all unless it may wait, and leaving the emergency reserves to others.
 */
void *rust_helper_alloc_read_buffer(size_t size, bool contiguous, bool wait)
{
	gfp_t gfp = (wait ? GFP_KERNEL : GFP_NOWAIT) | __GFP_ZERO;

	if (contiguous)
		return kmalloc(size, gfp | __GFP_NOMEMALLOC | __GFP_NORETRY |
				     __GFP_NOWARN);
	return __vmalloc(size, gfp);
}

void rust_helper_invalidate_read_buffer(void *addr, int size)
{
	invalidate_kernel_vmap_range(addr, size);
}

/*
 * Not bound to CPUs: the scheduler and the administrator (isolcpus, nohz_full,
 * the masks in sysfs) say where work is done, and no CPU that is busy with
 * something more urgent holds it up.
 */
struct workqueue_struct *rust_helper_alloc_lower_read_workqueue(void)
{
	return alloc_workqueue(KBUILD_MODNAME,
			       WQ_MEM_RECLAIM | WQ_HIGHPRI | WQ_UNBOUND |
			       WQ_SYSFS, num_online_cpus());
}

static DEFINE_MUTEX(lower_read_mutex);

void rust_helper_lower_read_lock(void)
{
	mutex_lock(&lower_read_mutex);
}

void rust_helper_lower_read_unlock(void)
{
	mutex_unlock(&lower_read_mutex);
}

int rust_helper_percpu_counters_init(struct percpu_counter *list, u32 count)
{
	return percpu_counter_init_many(list, 0, GFP_KERNEL, count);
}

void rust_helper_percpu_counters_destroy(struct percpu_counter *list, u32 count)
{
	percpu_counter_destroy_many(list, count);
}

void rust_helper_percpu_counter_count(struct percpu_counter *counter, s64 count)
{
	percpu_counter_add_local(counter, count);
}

s64 rust_helper_percpu_counter_total(struct percpu_counter *counter)
{
	return percpu_counter_sum_positive(counter);
}

unsigned int rust_helper_num_online_cpus_now(void)
{
	return num_online_cpus();
}

unsigned long rust_helper_jiffies_now(void)
{
	return jiffies;
}

/*
 * Whether this is `task`, in a state in which it may sleep, and not in a
 * read-side critical section of RCU. Without a count of preemption nobody can
 * tell, and the answer is no.
 */
bool rust_helper_task_may_work_here(const struct task_struct *task)
{
	return current == task && !bio_in_atomic() && task_is_running(current);
}

/*
 * The kernel's structures that Rust code takes apart. Where the kernel and the
 * module have their types (BTF), the loader compares the sizes of those that are
 * part of a structure of the module.
 */
struct dm_rust_structures {
	struct bio bio;
	struct bio_vec bio_vec;
	struct block_device block_device;
	struct bvec_iter bvec_iter;
	struct completion completion;
	struct module module;
	struct page page;
	struct queue_limits queue_limits;
	struct work_struct work_struct;
};

/*
 * Where symbols have no versions the loader takes a module that was built for
 * another build of the same release, in which structures may be different. So
 * what `uname -v` says, which has the number and date of the build, must be what
 * it was in the headers.
 */
int rust_helper_dm_register_target(struct target_type *type)
{
	BTF_TYPE_EMIT(struct dm_rust_structures);
#ifdef UTS_VERSION
	if (strcmp(init_uts_ns.name.version, UTS_VERSION)) {
		pr_err("built for the kernel \"%s\", but this is \"%s\": build the module for this one\n",
		       UTS_VERSION, init_uts_ns.name.version);
		return -ENOEXEC;
	}
#endif
	return dm_register_target(type);
}

/*
 * Whether the kernel's crc32c() has the processor's instruction for it, but not
 * the one with which it would compute several streams at a time.
 */
bool rust_helper_crc32c_has_one_stream(void)
{
#if defined(CONFIG_X86_64) && !defined(CONFIG_UML)
	return boot_cpu_has(X86_FEATURE_XMM4_2) &&
	       !boot_cpu_has(X86_FEATURE_PCLMULQDQ);
#else
	return false;
#endif
}
