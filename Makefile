# SPDX-License-Identifier: GPL-2.0
#
# For people; `make help` says what there is. The module's own rules are in
# Kbuild, the logic is in scripts/.

.DEFAULT_GOAL := modules
MAKEFLAGS += --no-print-directory
# One of these at a time: each uses all processors by itself.
.NOTPARALLEL:

export KDIR RELEASE SERIES MO JOBS
export C CF CLIPPY KRUSTFLAGS INSTALL_MOD_PATH INSTALL_MOD_STRIP V W

PREFIX ?= /usr/local
INSTALL_HDR_PATH ?= $(PREFIX)
TOOL_DIR := userspace-tool
TOOL_TARGET := x86_64-unknown-linux-gnu
TOOL_OUT = $(or $(CARGO_TARGET_DIR),$(TOOL_DIR)/target)/$(TOOL_TARGET)/release
KERNEL_RUST = $(shell find vhost_blk.rs bindings driver -name '*.rs' ! -name '*_generated.rs')

.PHONY: modules
modules:
	@scripts/module modules

.PHONY: clippy sparse modules_install
clippy sparse modules_install:
	@scripts/module $@

.PHONY: rustfmtcheck
rustfmtcheck:
	rustfmt --check $(KERNEL_RUST)
	cd $(TOOL_DIR) && cargo fmt --all --check

# Static, so that it runs in any guest; that needs --target.
.PHONY: tool
tool:
	cd $(TOOL_DIR) && RUSTFLAGS='-C target-feature=+crt-static' \
		cargo build --locked --release --target $(TOOL_TARGET)

.PHONY: headers_install
headers_install:
	install -D -m 644 include/uapi/linux/vhost_blk.h \
		$(DESTDIR)$(INSTALL_HDR_PATH)/include/linux/vhost_blk.h

.PHONY: install
install: modules_install headers_install
	install -D -m 755 $(TOOL_OUT)/vhost-blk $(DESTDIR)$(PREFIX)/bin/vhost-blk

# The long tests take longer than CI has.
.PHONY: test test-full test-debug
test:
	@tests/run
test-full:
	@tests/run --full
test-debug:
	@tests/run --debug

.PHONY: demo demo-shell
demo:
	@tests/demo
demo-shell:
	@tests/demo --shell

# BENCH: words in the names of cells, to measure only those.
.PHONY: bench bench-quick bench-exact
bench:
	@BENCH='$(BENCH)' bench/run full
bench-quick:
	@BENCH='$(BENCH)' bench/run quick
bench-exact:
	@BENCH='$(BENCH)' bench/run exact

.PHONY: clean
clean:
	@scripts/module clean
	rm -rf $(TOOL_DIR)/target

.PHONY: help
help:
	@echo  'Here, in the checkout:'
	@echo  '  make                  build vhost-blk.ko for the running kernel (Debian 13 with the'
	@echo  '                        kernel of trixie-backports)'
	@echo  '  make KDIR=DIR         build it against a configured and built kernel tree'
	@echo  '  make RELEASE=REL      build it for another installed Debian kernel'
	@echo  '  make SERIES=7.3       build it for that kernel of the Debian tree in the cache, on any'
	@echo  '                        x86_64 machine; the objects go to the cache'
	@echo  '  make MO=DIR           put the objects into DIR'
	@echo  '  make tool             build the user-space tool (userspace-tool/)'
	@echo  '  make modules_install  install the module for that kernel (root)'
	@echo  '  make headers_install  install linux/vhost_blk.h below INSTALL_HDR_PATH ($(INSTALL_HDR_PATH))'
	@echo  '  make install          both, and the tool below PREFIX ($(PREFIX))'
	@echo  '  make clean            remove what was built in the checkout'
	@echo  ''
	@echo  'Checks (KDIR, RELEASE and SERIES as above; CLIPPY=1, C=2, W=1, V=1 as for the kernel):'
	@echo  '  make clippy           no warning from clippy'
	@echo  '  make sparse           no warning from sparse'
	@echo  '  make rustfmtcheck     Rust code is formatted'
	@echo  ''
	@echo  'On any x86_64 machine, in a Debian tree in the cache (~/.cache/vhost-blk), as root or'
	@echo  'through sudo:'
	@echo  '  make demo             a guest on vhost-blk, from nothing'
	@echo  '  make demo-shell       the same, and then a shell in that guest'
	@echo  '  make test             all tests on the stock kernel but the long ones'
	@echo  '  make test-full        all tests on the stock kernel'
	@echo  '  make test-debug       the kernel tests on a kernel with KASAN, lockdep, kmemleak ...'
	@echo  ''
	@echo  'Measurements (docs/performance.md); BENCH="WORD ..." picks cells by name:'
	@echo  '  make bench-exact      instructions per request, the same on any machine (5 minutes)'
	@echo  '  make bench-quick      vhost-blk beside other paths: what the goals name (15 minutes)'
	@echo  '  make bench            the whole matrix (an hour, or more); goes on where it was interrupted'
