#!/usr/bin/env bash
# Run a command in an image's root file system as a strict cluster would: the image and the input
# read-only, no network, an empty environment, no home folder, a user id that nobody has.
#
#   run_read_only.sh ROOTFS BIDS OUT WORK COMMAND...     they are /bids, /out and /work inside
#
# Needs root, which it gives up before the command starts. Mounts end with it.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 2,8p "$0" >&2; exit 2; }
rootfs=$(realpath "$1") bids=$(realpath "$2") out=$(realpath "$3") work=$(realpath "$4")
shift 4
user=$((100000 + RANDOM))
chown -R "$user:$user" "$out" "$work"
root=$(mktemp -d)
trap 'rmdir "$root"' EXIT
export rootfs bids out work user root
# shellcheck disable=SC2016
unshare --mount --net --pid --fork --propagation private bash -euc '
    # As Apptainer does: folders that the image lacks are mount points of an overlay in memory.
    upper=$(mktemp -d)
    mount -t tmpfs tmpfs "$upper"
    mkdir "$upper/above" "$upper/scratch"
    mount -t overlay overlay -o "lowerdir=$rootfs,upperdir=$upper/above,workdir=$upper/scratch" "$root"
    mkdir -p "$root"/{bids,out,work,proc,dev,tmp}
    mount -o bind,ro "$bids" "$root/bids"
    mount --bind "$out" "$root/out"
    mount --bind "$work" "$root/work"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"
    mount -o remount,ro "$root"
    cd /
    exec chroot --userspec="$user:$user" --groups= "$root" \
        env -i PATH=/opt/m2m-bids/bin:/usr/bin:/bin LANG=C.UTF-8 \
        TEMPLATEFLOW_HOME=/opt/templateflow NO_ET=1 PYTHONDONTWRITEBYTECODE=1 "$@"' -- "$@"
