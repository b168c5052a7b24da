/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads: see Kbuild for the files that it keeps. */

#include "vhost.h"
#include <linux/virtio_blk.h>
#include <linux/vhost_blk.h>
#include "helpers.h"

/* Macros with casts, which bindgen does not evaluate by itself. */
const gfp_t RUST_CONST_HELPER_GFP_NOIO = GFP_NOIO;
const gfp_t RUST_CONST_HELPER_GFP_KERNEL_ACCOUNT_NOWARN = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
const gfp_t RUST_CONST_HELPER_GFP_NOWAIT_NOWARN = GFP_NOWAIT | __GFP_NOWARN;
const blk_status_t RUST_CONST_HELPER_BLK_STS_NOTSUPP = BLK_STS_NOTSUPP;
const blk_status_t RUST_CONST_HELPER_BLK_STS_ZONE_OPEN_RESOURCE = BLK_STS_ZONE_OPEN_RESOURCE;
const blk_status_t RUST_CONST_HELPER_BLK_STS_ZONE_ACTIVE_RESOURCE = BLK_STS_ZONE_ACTIVE_RESOURCE;
