# shellcheck shell=bash
# Test machines: Debian's kernels in qemu, for what this machine's kernel lacks. There need be no
# KVM: every instruction is emulated, and a machine's clock counts instructions (`-icount`), so that
# no test waits too shortly however slow or busy this machine is.
# shellcheck disable=SC2154  # workspace is build.sh's, log is count.sh's

# Debian releases whose newest cloud kernel is taken.
vm_kernels=${FERRY_VM_KERNELS:-bookworm trixie}
# Files of end-to-end tests that are run, of those that there are; NAME:PATTERN for some tests of one.
vm_tests=${FERRY_VM_TESTS:-task_api groups cgroups resources streams setup kernel survive:user_and_groups}
# Which tests of the others: a pattern of the shell.
vm_only=${FERRY_VM_ONLY:-*}
# Which unit tests of oci/: those that depend on the kernel.
vm_units=${FERRY_VM_UNITS-pages::tracker pages::scan freezer:: cgroups:: quarantine:: tmpfs::}
# How long a machine may run, in seconds.
vm_limit=${FERRY_VM_TIMEOUT:-14400}

vm_mirror=http://deb.debian.org/debian
vm_cache=${FERRY_CACHE:-$HOME/.cache/ferry}
vm_work=

vm_prerequisites() {
    # shellcheck disable=SC2034  # what install_packages looks at
    local programs="qemu-system-x86_64 qemu-system-x86
mke2fs e2fsprogs
objcopy binutils
xz xz-utils"
    install_packages
    [ -z "$prereq_failed" ]
}

# vm_kernel RELEASE: its newest kernel and modules, in the cache until they are removed there.
vm_kernel() {
    local done=$vm_cache/kernel-$1 new=$vm_cache/.kernel-$1.new version modules
    [ ! -d "$done" ] || return 0
    rm -rf "$new"
    mkdir -p "$new"
    mmdebstrap --quiet --variant=extract --include=linux-image-cloud-amd64 \
        --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Retries "3"' \
        "$1" "$new/all" "$vm_mirror" || return
    mv "$new"/all/boot/vmlinuz-* "$new/vmlinuz" || return
    modules=("$new"/all/lib/modules/* "$new"/all/usr/lib/modules/*)
    for version in "${modules[@]}"; do
        [ ! -d "$version" ] || break
    done
    mkdir -p "$new/lib/modules"
    mv "$version" "$new/lib/modules/" || return
    # busybox's modprobe is all that loads them.
    find "$new/lib/modules" -name '*.ko.xz' -print0 | xargs -0 --no-run-if-empty xz -d &&
        "$vm_base/usr/bin/busybox" depmod -b "$new" "${version##*/}" &&
        rm -rf "$new/all" && mv "$new" "$done"
}

# The base system and the images on one disk, in the cache.
vm_disk() {
    local name
    vm_disk=$vm_cache/vm-$(basename "$vm_base")-$(basename "$vm_images").img
    [ ! -e "$vm_disk" ] || return 0
    rm -f "$vm_cache"/vm-*.img
    # Mounts of a namespace of its own end with it.
    # shellcheck disable=SC2016  # for the shell in there
    unshare --mount /bin/bash -ec '
        tree=$1 disk=$2
        shift 2
        for folder; do
            mkdir -p "$tree/$(basename "$folder")"
            mount --bind "$folder" "$tree/$(basename "$folder")"
        done
        mke2fs -q -t ext4 -d "$tree" "$disk.new" 16G
    ' disk "$vm_work/tree" "$vm_disk" "$vm_base" "$vm_images" &&
        mv "$vm_disk.new" "$vm_disk"
}

# Builds the test programs, and copies them for the machines.
vm_binaries() {
    local binary name built tests=()
    for name in $vm_tests; do
        name=${name%%:*}
        [ ! -e "tests/tests/$name.rs" ] && [ ! -e "tests/tests/$name" ] || tests+=(--test "$name")
    done
    [ -z "$vm_units" ] || tests+=(--lib)
    built=$(cargo test --no-run --quiet --message-format=json --workspace \
        --features "${FERRY_FEATURES-}" --profile "${FERRY_PROFILE/#dev/test}" "${tests[@]}") || return
    while read -r binary; do
        name=$(basename "$binary")
        name=${name%-*}
        case " $vm_tests ferry_oci " in
        *" $name "* | *" $name:"*) objcopy --strip-debug "$binary" "$vm_work/payload/programs/deps/$name" || return ;;
        esac
    done < <(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$built")
}

# Everything that is run on the machines, where a test looks for it.
vm_payload() {
    local payload=$vm_work/payload name
    mkdir -p "$payload/programs/deps" "$payload/modules" "$payload/root$workspace"
    for name in ferry containerd-shim-ferry-v2 libferry_hide.so ferry-tar testbed; do
        objcopy --strip-debug "$(program "$name")" "$payload/programs/$name" || return
    done
    vm_binaries || return
    # Tests look for files of the workspace where they were built.
    git ls-files -z | xargs -0 cp --parents --no-dereference -t "$payload/root$workspace" || return
    cp tests/vm/machine.sh "$payload/machine.sh"
    # Seconds of the machine.
    printf '%s=%q\n' workspace "$workspace" tests "$vm_tests" only "$vm_only" unit_tests "$vm_units" test_limit 600 unit_limit 600 \
        >"$payload/settings"
}

# vm_initramfs KERNEL OUTPUT
vm_initramfs() {
    local root=$vm_work/initramfs program module file modules
    rm -rf "$root"
    mkdir -p "$root"/{bin,proc,dev,disk,payload,new}
    cp "$vm_base/usr/bin/busybox" "$root/bin/"
    for program in sh mount modprobe switch_root mkdir; do
        ln -s busybox "$root/bin/$program"
    done
    install -m 755 tests/vm/initramfs.sh "$root/init"
    modules=$(echo "$1"/lib/modules/*)
    for module in virtio_pci virtio_blk overlay; do
        # A module and those that it needs.
        while read -r file; do
            (cd "$1" && cp --parents "lib/modules/${modules##*/}/$file" "$root") || return
        done < <(sed -n "/\/$module\.ko:/s/://p" "$modules/modules.dep" | tr ' ' '\n' | sed '/^$/d')
    done
    (cd "$1" && cp --parents "lib/modules/${modules##*/}"/modules.{dep,alias} "$root") || return
    (cd "$root" && find . | "$vm_base/usr/bin/busybox" cpio -o -H newc 2>/dev/null) | gzip -1 >"$2"
}

# vm_boot KERNEL: runs the tests on a machine with this kernel; prints what they print.
vm_boot() {
    local payload=$vm_work/payload status=0
    vm_initramfs "$1" "$vm_work/initramfs.gz" || return
    rm -rf "$payload/modules" "$vm_work/payload.img"
    cp -a "$1/lib/modules" "$payload/modules" &&
        mke2fs -q -t ext4 -d "$payload" "$vm_work/payload.img" 3G >/dev/null || return
    # Of several processors 6.1 does not bring up the second with such a clock. Protections against
    # what nobody does there only cost time.
    TMPDIR=$vm_work timeout --foreground --kill-after=10 "$vm_limit" qemu-system-x86_64 -M q35 -cpu max -smp 1 -m 3072 \
        -accel tcg,thread=single -icount shift=0 -rtc clock=vm \
        -nodefaults -display none -no-reboot \
        -drive "file=$vm_disk,format=raw,if=virtio,snapshot=on,cache=unsafe" \
        -drive "file=$vm_work/payload.img,format=raw,if=virtio,readonly=on" \
        -kernel "$1/vmlinuz" -initrd "$vm_work/initramfs.gz" \
        -append "console=ttyS0 panic=-1 mitigations=off init_on_alloc=0 hardened_usercopy=off \
            randomize_kstack_offset=off nowatchdog random.trust_cpu=on cgroup_no_v1=all" \
        -serial "file:$vm_work/console" -serial stdio </dev/null || status=1
    if ! grep -q 'Restarting system' "$vm_work/console"; then
        tail -n 40 "$vm_work/console"
        status=1
    fi
    return $status
}

# vm_table LOG...: a row for each test, a column for each log.
vm_table() {
    awk '
        function row(name) { if (!(name in seen)) { seen[name] = 1; names[++count] = name } }
        FNR == 1 { columns++ }
        /^ +kernel / { kernel[columns] = $2; sub(",", "", kernel[columns]) }
        /^ +running / { binary = $2 }
        /^test .* \.\.\. / && binary != "ferry_oci" {
            name = binary "::" $2
            row(name)
            if (!((name, columns) in how)) how[name, columns] = $4
        }
        /^skipped: / { test = $2; sub(":$", "", test); how[binary "::" test, columns] = "skipped" }
        /^test result: / && binary == "ferry_oci" {
            row(binary)
            how[binary, columns] = $4 " ok, " $6 " FAILED"
        }
        END {
            printf "\n%-90s", "test"
            for (c = 1; c <= columns; c++) printf " %-24s", kernel[c]
            print ""
            for (n = 1; n <= count; n++) {
                printf "%-90s", names[n]
                for (c = 1; c <= columns; c++) {
                    result = how[names[n], c]
                    printf " %-24s", result == "" ? "-" : result
                }
                print ""
            }
        }' "$@"
}

# Boots every kernel in turn, and prints the table.
vm() {
    local FERRY_FEATURES=${FERRY_FEATURES-ferry-cli/fault-points}
    for vm_work in "$vm_cache"/vm-run.*; do
        # Left by a run that was killed.
        kill -0 "${vm_work##*.}" 2>/dev/null || rm -rf "$vm_work"
    done
    vm_work=$vm_cache/vm-run.$$
    mkdir -p "$vm_work"
    vm_run
    rm -rf "$vm_work"
}

vm_run() {
    local release logs=() at
    step "build" build_programs &&
        step "base system and images" "$(program testbed)" prepare || return
    vm_base=$(sed -n 's/^base //p' "$log")
    vm_images=$(sed -n 's/^images //p' "$log")
    step "disk of the test machines" vm_disk && step "tests for the machines" vm_payload || return
    for release in $vm_kernels; do
        step "kernel of $release" vm_kernel "$release" || continue
        at=$vm_work/$release.log
        cargo_tests "tests on the kernel of $release" vm_boot "$vm_cache/kernel-$release"
        cp "$log" "$at"
        logs+=("$at")
    done
    [ ${#logs[@]} = 0 ] || vm_table "${logs[@]}"
}
