# shellcheck shell=bash
# What the machine must have to build ferry and to run test hosts. Missing packages are installed
# with apt; for everything else there is one clear message each.

# The oldest Rust that builds the workspace.
rust_minimum=1.88
# Free disk space for the base system, images, what Go builds and a build, in MB.
disk_minimum=10000
# "program package": what is run by the build, the harness and the checks.
programs="mmdebstrap mmdebstrap
protoc protobuf-compiler
ip iproute2
nsenter util-linux
unshare util-linux
cc gcc
shellcheck shellcheck"

prereq_failed=

missing() {
    echo "missing: $1" >&2
    prereq_failed=yes
}

check_prerequisites() {
    check_root
    check_rust
    check_kernel
    check_disk
    [ -z "$prereq_failed" ] || exit 1
    install_packages
    [ -z "$prereq_failed" ] || exit 1
}

check_root() {
    [ "$(id -u)" = 0 ] || missing "root: test hosts are made of namespaces and mounts; run this as root"
}

check_rust() {
    if ! command -v cargo >/dev/null; then
        missing "Rust $rust_minimum or newer: see https://rustup.rs"
        return
    fi
    local version
    version=$(rustc --version | cut -d' ' -f2)
    if [ "$(printf '%s\n' "$rust_minimum" "$version" | sort -V | head -n1)" != "$rust_minimum" ]; then
        missing "Rust $rust_minimum or newer: this is $version; run \`rustup update\`"
    fi
}

check_kernel() {
    local namespace
    for namespace in cgroup ipc mnt net pid time uts; do
        [ -e "/proc/self/ns/$namespace" ] || missing "a kernel with $namespace namespaces"
    done
    grep -qw overlay /proc/filesystems || modprobe -q overlay 2>/dev/null ||
        missing "a kernel with the overlay file system (CONFIG_OVERLAY_FS)"
    [ -e /proc/thread-self/children ] ||
        missing "a kernel with CONFIG_PROC_CHILDREN (CRIU needs it)"
    if [ -r /proc/config.gz ] && ! grep -q '^CONFIG_NF_TABLES=[ym]' <(zcat /proc/config.gz); then
        missing "a kernel with nftables (CONFIG_NF_TABLES)"
    fi
}

check_disk() {
    local cache=${FERRY_CACHE:-$HOME/.cache/ferry} free kind
    mkdir -p "$cache"
    chmod 700 "$cache"
    free=$(df --output=avail -m "$cache" | tail -n1)
    [ "$free" -ge "$disk_minimum" ] ||
        missing "$disk_minimum MB of disk space at $cache (there are $free); FERRY_CACHE names another place"
    kind=$(stat -f -c %T "$cache")
    case $kind in
    overlayfs | tmpfs | nfs | fuseblk)
        missing "a real disk for $cache (it is on $kind); FERRY_CACHE names another place"
        ;;
    esac
}

# What building runc takes besides Go. That it is missing the harness says by itself.
install_for_builds() {
    ! command -v go >/dev/null || pkg-config --exists libseccomp 2>/dev/null ||
        apt_install pkg-config libseccomp-dev
}

install_packages() {
    local program package wanted=()
    while read -r program package; do
        command -v "$program" >/dev/null || wanted+=("$package")
    done <<<"$programs"
    [ ${#wanted[@]} -eq 0 ] || apt_install "${wanted[@]}"
}

apt_install() {
    local wanted=("$@")
    if ! command -v apt-get >/dev/null; then
        missing "packages ${wanted[*]}: install them with this system's package manager"
        return
    fi
    echo "installing packages: ${wanted[*]}" >&2
    apt-get update -qq -o Acquire::Check-Valid-Until=false >&2 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${wanted[@]}" >&2 ||
        missing "packages ${wanted[*]}: apt could not install them"
}
