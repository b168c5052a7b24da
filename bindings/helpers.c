// SPDX-License-Identifier: GPL-2.0

#include <linux/module.h>
#include <linux/vmalloc.h>

#include "vhost.h"
#include "helpers.h"

/*
 * The module! macro has no field for it. sparse cannot evaluate the assertion
 * on the string's length that comes with it.
 */
#ifndef __CHECKER__
MODULE_VERSION("0.1.0");
#endif

bool rust_helper_bdev_read_only(struct block_device *bdev)
{
	return bdev_read_only(bdev);
}

bool rust_helper_bdev_nowait(struct block_device *bdev)
{
	return bdev_nowait(bdev);
}

/*
 * The block layer has every disk with tags take REQ_NOWAIT, but calls the
 * driver where the bio is submitted all the same, and that may sleep. A driver
 * may free its tags once its disk is removed, which takes the mutex.
 */
bool rust_helper_bdev_may_sleep(struct block_device *bdev)
{
	struct gendisk *disk = bdev->bd_disk;
	struct request_queue *queue = disk->queue;
	bool may_sleep;

	if (!queue_is_mq(queue))
		return false;
	if (mutex_lock_killable(&disk->open_mutex))
		return true;
	may_sleep = !disk_live(disk) || queue->tag_set->flags & BLK_MQ_F_BLOCKING;
	mutex_unlock(&disk->open_mutex);
	return may_sleep;
}

bool rust_helper_bdev_write_cache(struct block_device *bdev)
{
	return bdev_write_cache(bdev);
}

int rust_helper_bdev_alignment_offset(struct block_device *bdev)
{
	return bdev_alignment_offset(bdev);
}

unsigned int rust_helper_bdev_nr_zones(struct block_device *bdev)
{
	return bdev_nr_zones(bdev);
}

sector_t rust_helper_bdev_zone_sectors(struct block_device *bdev)
{
	return bdev_zone_sectors(bdev);
}

/* A copy: they may change, and Rust has no references to what changes. */
void rust_helper_bdev_limits(struct block_device *bdev, struct queue_limits *to)
{
	*to = data_race(bdev_get_queue(bdev)->limits);
}

bool rust_helper_bdev_zone_writes_queue(struct block_device *bdev)
{
	return blk_queue_zoned_qd1_writes(bdev_get_queue(bdev));
}

/*
 * What block/blk-zoned.c says in blkdev_has_cached_report_zones(), which is in
 * no header: blkdev_get_zone_info() does not ask the disk then.
 */
bool rust_helper_bdev_zone_info_cached(struct block_device *bdev)
{
	struct gendisk *disk = bdev->bd_disk;

	return disk->zone_wplugs_hash && rcu_access_pointer(disk->zones_cond) &&
	       (bdev_emulates_zone_append(bdev) ||
		(queue_is_mq(disk->queue) &&
		 !test_bit(GD_ZONE_APPEND_USED, &disk->state)));
}

/* Null where the kernel has no such cgroups. */
struct cgroup_subsys_state *rust_helper_current_io_css(void)
{
#ifdef CONFIG_BLK_CGROUP
	return task_get_css(current, io_cgrp_id);
#else
	return NULL;
#endif
}

void rust_helper_css_put(struct cgroup_subsys_state *css)
{
	if (css)
		css_put(css);
}

void rust_helper_associate_blkcg(struct cgroup_subsys_state *css)
{
	kthread_associate_blkcg(css);
}

struct file *rust_helper_get_file(struct file *file)
{
	return get_file(file);
}

loff_t rust_helper_i_size_read(const struct inode *inode)
{
	return i_size_read(inode);
}

bool rust_helper_sb_rdonly(const struct super_block *sb)
{
	return sb_rdonly(sb);
}

/* The path is a field of a union without a name. */
int rust_helper_file_getattr(struct file *file, struct kstat *stat, u32 mask)
{
	return vfs_getattr(&file->f_path, stat, mask, 0);
}

void rust_helper_kiocb_end_write(struct kiocb *iocb)
{
	kiocb_end_write(iocb);
}

const struct cred *rust_helper_override_creds(const struct cred *cred)
{
	return override_creds(cred);
}

void rust_helper_revert_creds(const struct cred *cred)
{
	revert_creds(cred);
}

unsigned int rust_helper_memalloc_noio_save(void)
{
	return memalloc_noio_save();
}

void rust_helper_memalloc_noio_restore(unsigned int flags)
{
	memalloc_noio_restore(flags);
}

void rust_helper_init_work(struct work_struct *work, work_func_t func)
{
	INIT_WORK(work, func);
}

/* A loop, since its iterator is a macro. */
bool rust_helper_bio_dirty(struct bio *bio)
{
	struct folio_iter fi;

	bio_for_each_folio_all(fi, bio) {
		if (!folio_test_dirty(fi.folio))
			return false;
	}
	return true;
}

bool rust_helper_page_dirty(struct page *page)
{
	return folio_test_dirty(page_folio(page));
}

bool rust_helper_get_user_u16(u16 *to, const u16 __user *from)
{
	return !get_user(*to, from);
}

/* A loop, since unsafe_get_user() is a macro. */
static __always_inline bool get_user_pairs(u64 *to, const u64 __user *from, unsigned int pairs)
{
	if (!user_access_begin(from, 2 * pairs * sizeof(*from)))
		return false;
	for (; pairs; pairs--, to += 2, from += 2) {
		unsafe_get_user(to[0], &from[0], fault);
		unsafe_get_user(to[1], &from[1], fault);
	}
	user_access_end();
	return true;
fault:
	user_access_end();
	return false;
}

/* One, of which the length is known: that takes fewer checks. */
bool rust_helper_get_user_pair(u64 *to, const u64 __user *from)
{
	return get_user_pairs(to, from, 1);
}

bool rust_helper_get_user_pairs(u64 *to, const u64 __user *from, unsigned int pairs)
{
	return get_user_pairs(to, from, pairs);
}

bool rust_helper_put_user_u8(u8 value, u8 __user *to)
{
	return !put_user(value, to);
}

bool rust_helper_put_user_u16(u16 value, u16 __user *to)
{
	return !put_user(value, to);
}

bool rust_helper_put_user_u64(u64 value, u64 __user *to)
{
	return !put_user(value, to);
}

struct page *rust_helper_zero_page(void)
{
	return ZERO_PAGE(0);
}

void *rust_helper_vmap(struct page **pages, unsigned int count)
{
	return vmap(pages, count, VM_MAP, PAGE_KERNEL);
}

void rust_helper_vunmap(void *base)
{
	vunmap(base);
}

void rust_helper_spin_lock_init(spinlock_t *lock)
{
	spin_lock_init(lock);
}

unsigned long rust_helper_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

void rust_helper_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

void rust_helper_llist_add(struct llist_node *node, struct llist_head *head)
{
	llist_add(node, head);
}

struct llist_node *rust_helper_llist_del_all(struct llist_head *head)
{
	return llist_del_all(head);
}

/*
 * Whether this is a task of that address space, which will go back to user space
 * and has not been killed.
 */
bool rust_helper_in_task_of(const struct mm_struct *mm)
{
	return in_task() && mm && current->mm == mm &&
	       !(current->flags & (PF_KTHREAD | PF_USER_WORKER | PF_EXITING)) &&
	       !fatal_signal_pending(current);
}

void rust_helper_this_module_get(void)
{
	__module_get(THIS_MODULE);
}

void rust_helper_this_module_put(void)
{
	module_put(THIS_MODULE);
}

void rust_helper_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

void rust_helper_local_bh_disable_enable(void)
{
	local_bh_disable();
	local_bh_enable();
}

u64 rust_helper_local_clock(void)
{
	return local_clock();
}

/* Lets others have the processor, and says whether the task was killed. */
bool rust_helper_cond_resched_killed(void)
{
	cond_resched();
	return fatal_signal_pending(current);
}

bool rust_helper_need_resched(void)
{
	return need_resched();
}

bool rust_helper_need_resched_lazy(void)
{
	return test_thread_flag(TIF_NEED_RESCHED_LAZY);
}

bool rust_helper_vhost_is_little_endian(struct vhost_virtqueue *vq)
{
	return vhost_is_little_endian(vq);
}
