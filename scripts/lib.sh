# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
#
# What the project's scripts share; to be sourced after `set -euo pipefail`.
#
#   top, cache            the checkout and the cache folder
#   emulated_cpu          the processor of an emulated host, for QEMU's -cpu
#   say MSG...            a line of progress, with the time since the start
#   die MSG [NEXT-STEP]   an error, and what to do about it
#   as_root CMD...        run a program as root, through sudo where needed
#   inside_tree           true in the Debian tree (scripts/debian-tree)
#   with_lock NAME CMD... run a command or function under a lock in the cache
#   need_space GB DIR     refuse to start a job that would fill the disk
#   logged NAME CMD...    run a long job: output to a log, a sign of life
#   with_timeout S WHAT CMD...
#   once KEY FUNC [ID]    build a folder of the cache exactly once
#   unpack_kernel ARCHIVE DIR

top=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/vhost-blk
# 'sudo make install' finds what 'make' has made.
if [[ $EUID == 0 && -n ${SUDO_USER-} && -z ${XDG_CACHE_HOME-} && -z ${VHOST_BLK_TREE-} ]]; then
	cache=$(getent passwd "$SUDO_USER" | cut -d : -f 6)/.cache/vhost-blk
fi
# With five-level page tables a nested guest dies at boot. Where strings of bytes are said to be fast (ERMS, FSRM, FSRS),
# kernels and libc copy and clear byte by byte, a step of the emulator for each: programs take twice as long to start.
emulated_cpu=max,la57=off,erms=off,fsrm=off,fsrs=off
export VHOST_BLK_START=${VHOST_BLK_START:-$EPOCHSECONDS}

say() {
	local t=$((EPOCHSECONDS - VHOST_BLK_START))
	printf '[%3d:%02d] %s\n' $((t / 60)) $((t % 60)) "$*" >&2
}

die() {
	printf 'error: %s\n' "$1" >&2
	[[ -z ${2-} ]] || printf '  next: %s\n' "$2" >&2
	exit 1
}

have() {
	command -v -- "$1" >/dev/null 2>&1
}

inside_tree() {
	[[ ${VHOST_BLK_TREE-} == inside ]]
}

# Only programs, not functions. sudo drops the environment: what the program
# needs of it goes through env(1).
as_root() {
	if ((EUID == 0)); then
		"$@"
		return
	fi
	have sudo || die "root is needed here, for ${1##*/}: you are not root, and there is no sudo" \
		"run the same command as root"
	local sudo=(sudo)
	# Without a terminal nobody can be asked for a password.
	{ : </dev/tty; } 2>/dev/null || sudo+=(-n)
	"${sudo[@]}" -v ||
		die "root is needed here, for ${1##*/}, and sudo refused" \
			"run 'sudo -v' first, or run the same command as root"
	local keep=("HOME=$HOME" "XDG_CACHE_HOME=${cache%/vhost-blk}") name
	for name in VHOST_BLK_START TERM CI http_proxy https_proxy no_proxy; do
		[[ -z ${!name-} ]] || keep+=("$name=${!name}")
	done
	"${sudo[@]}" env "${keep[@]}" "$@"
}

# Children inherit the lock: when this shell is killed, it is held until they
# are gone too.
with_lock() {
	local file=$cache/$1.lock
	shift
	{ mkdir -p -- "${file%/*}" && { [[ -e $file ]] || : >"$file"; }; } 2>/dev/null ||
		die "cannot write to ${file%/*}" \
			"take it over (sudo chown -R \$USER $cache), or set XDG_CACHE_HOME to a folder of your own"
	(
		if ! flock -n 9; then
			say "waiting for another run that holds $file"
			flock 9
		fi
		"$@"
	) 9<"$file"
}

need_space() {
	local dir=$2 free
	while [[ ! -d $dir ]]; do dir=$(dirname -- "$dir"); done
	free=$(df --output=avail -BG -- "$dir" | tail -n 1 | tr -dc 0-9)
	((free >= $1)) || die "$2 has ${free} GB free, $1 GB are needed" \
		"free some space there, or set XDG_CACHE_HOME to a folder on a larger disk"
}

# logged NAME CMD...: CMD's output goes to log/NAME.log in the cache; shown
# is a line now and then, and the end of the log when CMD fails.
logged() {
	local log=$cache/log/$1.log rc=0 ticker shell=$BASHPID
	shift
	mkdir -p -- "${log%/*}"
	# It may be another user's.
	rm -f -- "$log"
	: >"$log"
	(
		exec 9>&-
		start=$EPOCHSECONDS
		while sleep 15 && kill -0 "$shell" 2>/dev/null; do
			say "  still at it ($((EPOCHSECONDS - start)) s): $(tail -n 1 -- "$log" | tr -d '\r' | cut -c 1-100)"
		done
	) &
	ticker=$!
	"$@" </dev/null >"$log" 2>&1 || rc=$?
	kill "$ticker" 2>/dev/null
	wait "$ticker" 2>/dev/null || :
	if ((rc)); then
		printf -- '--- the end of %s:\n' "$log" >&2
		tail -n 25 -- "$log" >&2
	fi
	return "$rc"
}

# with_timeout SECONDS WHAT CMD...: CMD is a program, not a function. Says
# what hung; its exit code is 124 then.
with_timeout() {
	local seconds=$1 what=$2 rc=0
	shift 2
	timeout --kill-after=10 "$seconds" "$@" || rc=$?
	if ((rc == 124 || rc == 137)); then
		printf 'error: %s did not end within %s s: stopped\n' "$what" "$seconds" >&2
		return 124
	fi
	return "$rc"
}

# once KEY FUNC [ID]: makes the folder KEY of the cache by `FUNC DIR`, unless
# it is there, complete, and made for the same ID. FUNC runs in a shell of its
# own and gets an empty DIR. A half-made one is made anew, unless FUNC has left
# the ID in DIR/.resume: then FUNC gets DIR as it is, to go on. Call it as a
# plain command: under `||` or `if` the shell would ignore FUNC's errors.
# (Built in place, not renamed: build trees hold their own absolute path.)
once() {
	local stamp=$cache/$1/.complete
	[[ -e $stamp && $(<"$stamp") == "${3-}" ]] || with_lock "$1" once_locked "$@"
}

once_locked() {
	local dir=$cache/$1 id=${3-}
	local stamp=$dir/.complete
	if [[ -e $stamp && $(<"$stamp") == "$id" ]]; then
		return
	fi
	if [[ -e $dir/.resume && $(<"$dir/.resume") == "$id" ]]; then
		say "going on with $dir"
	elif [[ -e $dir ]]; then
		say "removing $dir: half-made or outdated"
		rm -rf --one-file-system -- "$dir" || die "cannot remove $dir" \
			"remove it as root, then run the same command again"
	fi
	mkdir -p -- "$dir"
	"$2" "$dir"
	printf '%s\n' "$id" >"$stamp.new"
	mv -- "$stamp.new" "$stamp"
}

# unpack_kernel ARCHIVE DIR: a kernel's source without the two thirds of it that
# neither building modules nor our debug kernel compiles. Kconfig files stay,
# all of them are read.
unpack_kernel() {
	local excludes=() path
	for path in drivers/{gpu/drm,net/ethernet,net/wireless,media,infiniband,staging,iio,clk,pinctrl} sound; do
		excludes+=(--exclude="*/$path/*.[ch]")
	done
	for path in arm arm64 alpha arc csky hexagon loongarch m68k microblaze mips nios2 openrisc \
		parisc powerpc riscv s390 sh sparc um xtensa; do
		excludes+=(--exclude="*/arch/$path/*".{c,h,S,dts,dtsi})
	done
	excludes+=(--exclude='*/tools/perf/*' --exclude='*/tools/testing/*'
		--exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml')
	tar -C "$2" --strip-components=1 --no-same-owner -I 'xz -T0' "${excludes[@]}" -xf "$1"
}
