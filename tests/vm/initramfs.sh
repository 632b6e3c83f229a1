#!/bin/sh
# First process of a test machine: finds its disks and moves into a system over the cached base
# system, as writable as the machine's own.
set -e
mount -t proc proc /proc
mount -t devtmpfs dev /dev
# Not all of them are modules in every kernel.
for module in virtio_pci virtio_blk overlay; do
    modprobe -q "$module" || true
done
mount -t ext4 /dev/vda /disk
mount -t ext4 -o ro /dev/vdb /payload
mkdir -p /disk/machine/upper /disk/machine/work
for base in /disk/base-*; do
    mount -t overlay overlay /new \
        -o "lowerdir=$base,upperdir=/disk/machine/upper,workdir=/disk/machine/work"
done
mkdir -p /new/disk /new/payload
for place in proc dev disk payload; do
    mount -o move "/$place" "/new/$place"
done
exec switch_root /new /payload/machine.sh </dev/console >/dev/console 2>&1
