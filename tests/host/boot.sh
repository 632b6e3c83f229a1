#!/bin/sh
# First process of a test host: started by the harness in fresh namespaces, with the root file
# system of the machine still in view. Builds the host's own, moves into it and becomes its init.
# Set by the harness: FERRY_BASE (the shared base system, read only), FERRY_DISK (this host's folder
# on a real disk), FERRY_SHARED (the lab's folder, which all its hosts see), FERRY_STATE (where the
# harness waits for `pid`), FERRY_NAME.
set -eu

# The old proc is still mounted, so this is the process id as the machine sees it.
read -r pid rest </proc/self/stat
echo "$pid" >"$FERRY_STATE/pid.new"
mv "$FERRY_STATE/pid.new" "$FERRY_STATE/pid"

root=$FERRY_DISK/root
mount -t overlay overlay "$root" \
    -o "lowerdir=$FERRY_BASE,upperdir=$FERRY_DISK/upper,workdir=$FERRY_DISK/work,volatile"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir dev/pts dev/shm dev/mqueue dev/net run/lock run/sshd
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t mqueue mqueue dev/mqueue
for node in null zero full random urandom tty net/tun fuse userfaultfd cpu_dma_latency; do
    [ -c "/dev/$node" ] || continue
    mknod -m 666 "dev/$node" c "$(stat -c 0x%t "/dev/$node")" "$(stat -c 0x%T "/dev/$node")"
done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr

# Every cgroup hierarchy this process is in, seen from its own cgroup namespace.
if [ "$(cut -d: -f2 /proc/self/cgroup)" = "" ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    # Controllers can be handed on only by a group without processes: the harness does that, which
    # also moves the parent of this one.
    mkdir sys/fs/cgroup/init
    echo 1 >sys/fs/cgroup/init/cgroup.procs
else
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    while IFS=: read -r _ controllers _; do
        case $controllers in
        "")
            mkdir sys/fs/cgroup/unified
            mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
            ;;
        name=*)
            mkdir "sys/fs/cgroup/${controllers#name=}"
            mount -t cgroup -o "none,$controllers" cgroup "sys/fs/cgroup/${controllers#name=}"
            ;;
        *)
            mkdir "sys/fs/cgroup/$controllers"
            mount -t cgroup -o "$controllers" cgroup "sys/fs/cgroup/$controllers"
            ;;
        esac
    done </proc/self/cgroup
fi

# A container's root cannot be an overlay on this overlay.
mkdir -p var/lib/containerd
mount --bind "$FERRY_DISK/containerd" var/lib/containerd
mkdir -p srv/lab
mount --bind "$FERRY_SHARED" srv/lab

echo "$FERRY_NAME" >proc/sys/kernel/hostname
# Serving lazy pages takes pipes of 4 MB.
if [ "$(cat proc/sys/fs/pipe-max-size)" -lt 67108864 ]; then
    echo 67108864 >proc/sys/fs/pipe-max-size
fi

pivot_root . mnt
exec chroot . /bin/sh -c '
    umount -l /mnt
    ip link set lo up
    exec env -i /bin/busybox init </dev/null >/var/log/init.log 2>&1'
