/* SPDX-License-Identifier: GPL-2.0 */
#ifndef VHOST_BLK_HELPERS_H
#define VHOST_BLK_HELPERS_H
/* Functions for what is only a macro or a static inline in C, and for what is asked of several of them. */

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/bottom_half.h>
#include <linux/cgroup.h>
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/kthread.h>
#include <linux/llist.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/mm.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

struct vhost_virtqueue;

bool rust_helper_bdev_read_only(struct block_device *bdev);
bool rust_helper_bdev_nowait(struct block_device *bdev);
bool rust_helper_bdev_may_sleep(struct block_device *bdev);
bool rust_helper_bdev_write_cache(struct block_device *bdev);
int rust_helper_bdev_alignment_offset(struct block_device *bdev);
unsigned int rust_helper_bdev_nr_zones(struct block_device *bdev);
sector_t rust_helper_bdev_zone_sectors(struct block_device *bdev);
void rust_helper_bdev_limits(struct block_device *bdev, struct queue_limits *to);
bool rust_helper_bdev_zone_writes_queue(struct block_device *bdev);
bool rust_helper_bdev_zone_info_cached(struct block_device *bdev);

struct cgroup_subsys_state *rust_helper_current_io_css(void);
void rust_helper_css_put(struct cgroup_subsys_state *css);
void rust_helper_associate_blkcg(struct cgroup_subsys_state *css);

struct file *rust_helper_get_file(struct file *file);
loff_t rust_helper_i_size_read(const struct inode *inode);
bool rust_helper_sb_rdonly(const struct super_block *sb);
int rust_helper_file_getattr(struct file *file, struct kstat *stat, u32 mask);
void rust_helper_kiocb_end_write(struct kiocb *iocb);
const struct cred *rust_helper_override_creds(const struct cred *cred);
void rust_helper_revert_creds(const struct cred *cred);

unsigned int rust_helper_memalloc_noio_save(void);
void rust_helper_memalloc_noio_restore(unsigned int flags);

void rust_helper_init_work(struct work_struct *work, work_func_t func);

bool rust_helper_bio_dirty(struct bio *bio);
bool rust_helper_page_dirty(struct page *page);
bool rust_helper_get_user_u16(u16 *to, const u16 __user *from);
bool rust_helper_get_user_pair(u64 *to, const u64 __user *from);
bool rust_helper_get_user_pairs(u64 *to, const u64 __user *from, unsigned int pairs);
bool rust_helper_put_user_u8(u8 value, u8 __user *to);
bool rust_helper_put_user_u16(u16 value, u16 __user *to);
bool rust_helper_put_user_u64(u64 value, u64 __user *to);

struct page *rust_helper_zero_page(void);
void *rust_helper_vmap(struct page **pages, unsigned int count);
void rust_helper_vunmap(void *base);

void rust_helper_spin_lock_init(spinlock_t *lock);
unsigned long rust_helper_spin_lock_irqsave(spinlock_t *lock);
void rust_helper_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);

void rust_helper_llist_add(struct llist_node *node, struct llist_head *head);
struct llist_node *rust_helper_llist_del_all(struct llist_head *head);

bool rust_helper_in_task_of(const struct mm_struct *mm);
void rust_helper_this_module_get(void);
void rust_helper_this_module_put(void);
void rust_helper_synchronize_rcu_tasks(void);

void rust_helper_local_bh_disable_enable(void);

u64 rust_helper_local_clock(void);
bool rust_helper_cond_resched_killed(void);
bool rust_helper_need_resched(void);
bool rust_helper_need_resched_lazy(void);

bool rust_helper_vhost_is_little_endian(struct vhost_virtqueue *vq);

#endif /* VHOST_BLK_HELPERS_H */
