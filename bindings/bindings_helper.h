/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads: see Kbuild for the files that it keeps. */

#include "vhost.h"
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <linux/vhost_blk.h>
#include "helpers.h"

/* Macros with casts or of several, which bindgen does not evaluate by itself. */
const gfp_t RUST_CONST_HELPER_GFP_NOIO = GFP_NOIO;
const gfp_t RUST_CONST_HELPER_GFP_KERNEL_ACCOUNT_NOWARN = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
const gfp_t RUST_CONST_HELPER_GFP_ZERO = __GFP_ZERO;
const gfp_t RUST_CONST_HELPER_GFP_NOWAIT_NOWARN = GFP_NOWAIT | __GFP_NOWARN;
const blk_features_t RUST_CONST_HELPER_BLK_FEAT_ZONED = BLK_FEAT_ZONED;
const fmode_t RUST_CONST_HELPER_FMODE_CAN_ODIRECT = FMODE_CAN_ODIRECT;
const int RUST_CONST_HELPER_IOCB_DIRECT = IOCB_DIRECT;
const int RUST_CONST_HELPER_IOCB_WRITE = IOCB_WRITE;
const int RUST_CONST_HELPER_IOCB_DSYNC = IOCB_DSYNC;
const int RUST_CONST_HELPER_FALLOC_PUNCH_HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
const int RUST_CONST_HELPER_FALLOC_ZERO_RANGE = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
const blk_status_t RUST_CONST_HELPER_BLK_STS_AGAIN = BLK_STS_AGAIN;
const blk_status_t RUST_CONST_HELPER_BLK_STS_NOTSUPP = BLK_STS_NOTSUPP;
const blk_status_t RUST_CONST_HELPER_BLK_STS_ZONE_OPEN_RESOURCE = BLK_STS_ZONE_OPEN_RESOURCE;
const blk_status_t RUST_CONST_HELPER_BLK_STS_ZONE_ACTIVE_RESOURCE = BLK_STS_ZONE_ACTIVE_RESOURCE;
