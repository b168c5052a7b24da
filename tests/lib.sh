# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What tests/run and tests/demo share; sourced after scripts/lib.sh.
#
#   in_tree CMD...       run a program in the Debian tree
#   need_tree            the Debian tree; sets series, newest and tree
#   make_module SERIES   vhost-blk.ko; sets module and release
#   make_tool            the programs; sets tool and selftest
#   make_qemu            the patched QEMU; sets qemu
#   make_guest RELEASE   the guest's initramfs, and a disk that boots it; sets
#                        initrd and boot_disk
#   kill_tree PID        end a process and what it has started
#   in_host NAME OPTION... -- CMD...   boot a host, run CMD in it
#   in_debug_host NAME ARG...          the same with tests/host/debug

# git in the tree runs as root in a checkout that may be another user's.
in_tree() {
	"$top/scripts/in-tree" env GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory \
		GIT_CONFIG_VALUE_0='*' "$@"
}

need_tree() {
	tree=$("$top/scripts/debian-tree")
	# Kernel series for which the tree has all that is needed, newest first.
	mapfile -t series < <(for path in "$tree"/usr/src/linux-headers-*-cloud-amd64/.config; do
		path=${path#"$tree"/usr/src/linux-headers-}
		echo "$path" | cut -d. -f1,2
	done | sort -rVu)
	((${#series[@]})) || die "the tree $tree has no kernel headers" \
		"remove it as root (rm -rf $tree), then run the same command again"
	newest=${series[0]}
}

make_module() {
	SERIES=$1 MO='' "$top/scripts/module" modules || return
	release=$(basename "$("$top/scripts/kernel-dir" --series "$1")")
	module=$cache/build/$release/vhost-blk.ko
	[[ -s $module ]]
}

make_tool() {
	local dir=$cache/cargo-target/x86_64-unknown-linux-gnu/release
	in_tree make --no-print-directory -C "$top" tool || return
	tool=$dir/vhost-blk selftest=$dir/selftest
	[[ -x $tool && -x $selftest ]]
}

make_qemu() {
	qemu=$(in_tree "$top/qemu/build")/qemu-system-x86_64 || return
	[[ -x $qemu ]]
}

make_guest() {
	initrd=$(in_tree "$top/tests/guest/mkinitramfs" "$cache/guest" "$1") || return
	# The command line is the one of tests/host/vm.py.
	boot_disk=$(in_tree "$top/tests/guest/mkbootdisk" "$cache/guest" "$1" "$initrd" \
		"console=ttyS0 loglevel=5 nokaslr panic=-1 nohz=on tsc=nowatchdog") || return
	[[ -s $initrd && -s $boot_disk ]]
}

# kill_tree PID: a process and what it has started.
kill_tree() {
	local child
	for child in $(ps -o pid= --ppid "$1"); do
		kill_tree "$child"
	done
	kill "$1" 2>/dev/null || [[ ! -e /proc/$1 ]] || (as_root kill "$1") 2>/dev/null || :
}

# Under a lock: two of the same name would share a folder.
in_host() {
	with_lock "host/$1" in_host_locked "$@"
}

in_host_locked() {
	local options=() work=$cache/host/$1
	shift
	while [[ $1 != -- ]]; do
		options+=("$1")
		shift
	done
	shift
	fresh_folder "$work"
	in_tree "$top/tests/host/boot" "${options[@]}" "$work" "$@"
}

in_debug_host() {
	with_lock "host/$1" in_debug_host_locked "$@"
}

in_debug_host_locked() {
	local work=$cache/host/$1
	shift
	fresh_folder "$work"
	in_tree "$top/tests/host/debug" "$work" "$@"
}

fresh_folder() {
	as_root rm -rf --one-file-system -- "$1"
	mkdir -p -- "$1"
}
