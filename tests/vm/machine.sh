#!/bin/bash
# What a test machine does once it is in its own system: becomes one where hosts can be made (with
# cgroup v2 alone), runs the tests, and ends. What the tests print goes to the second serial port.
shopt -s extglob
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
ln -sfn /proc/self/fd /dev/fd
# The kernel loads by itself what is asked for.
ln -sfn /bin/busybox /sbin/modprobe
# The machine that makes hosts has this one of util-linux.
ln -sfn /bin/busybox /sbin/pivot_root
mkdir -p /lib/modules
mount --bind /payload/modules /lib/modules
modprobe -a tun fuse veth bridge nf_tables inet_diag tcp_diag udp_diag unix_diag packet_diag \
    netlink_diag 2>/dev/null
ip link set lo up
cp -a /payload/root/. /

stty -F /dev/ttyS1 raw -echo
exec >/dev/ttyS1 2>&1 </dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export FERRY_CACHE=/disk FERRY_TEST_FEW=yes RUST_BACKTRACE=1
# With one alone, a test's name and how it ends stand on different lines.
export RUST_TEST_THREADS=2
# Where the tests were built, their files and which tests of each (a pattern), which unit tests, and how
# long each may take in seconds.
workspace='' tests='' only='*' unit_tests='' test_limit=600 unit_limit=600
# shellcheck source=/dev/null
. /payload/settings

# limited SECONDS WHAT COMMAND...: a test program; says itself that it failed if that was killed.
limited() {
    local status start=$SECONDS limit=$1 what=$2
    shift 2
    timeout --kill-after=10 "$limit" "$@"
    status=$?
    if [ $status != 0 ] && [ $status != 101 ]; then
        echo "test $what ... FAILED"
        echo "test result: FAILED. 0 passed; 1 failed; 0 ignored; it ended with status $status"
    fi
    echo "     $((SECONDS - start)) s of the machine's time"
}

echo "     kernel $(uname -r), cgroups: $(cut -d' ' -f1,3 /proc/mounts | grep '^cgroup' | xargs)"
for binary in /payload/programs/deps/*; do
    name=$(basename "$binary")
    echo "     running $name"
    case $name in
    ferry_oci)
        cd "$workspace/oci" || continue
        # shellcheck disable=SC2086  # several filters
        limited "$unit_limit" "$name" "$binary" --color never $unit_tests
        ;;
    *)
        pattern=$only
        for test in $tests; do
            case $test in
            "$name":*) pattern=${test#*:} ;;
            esac
        done
        for test in $("$binary" --list --format terse | sed -n 's/: test$//p'); do
            # shellcheck disable=SC2254  # a pattern
            case $test in
            # For itself, so that it hangs or crashes alone.
            $pattern) limited "$test_limit" "$test" "$binary" --color never --exact "$test" ;;
            esac
        done
        ;;
    esac
done
echo "     the machine ends after $(cut -d' ' -f1 /proc/uptime) s of its own time"
sync
busybox reboot -f
