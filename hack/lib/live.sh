# shellcheck shell=bash
# Two test hosts for unit tests that speak to a real containerd.

# live_start: starts the hosts and sets FERRY_TEST_CONTAINERD to the sockets of their containerds.
# Host a has a container `live`, host b lacks its image. The hosts go with this process.
live_start() {
    local name pid sockets=()
    coproc live_hosts { exec "$(program testbed)" hold --hosts 2; }
    while read -r name _ _ pid <&"${live_hosts[0]}"; do
        case $name in
        a | b)
            sockets+=("/proc/$pid/root/run/containerd/containerd.sock")
            live_on "$pid" "$name" || return
            ;;
        floating) break ;;
        esac
    done
    [ ${#sockets[@]} = 2 ] || return
    export FERRY_TEST_CONTAINERD="${sockets[0]},${sockets[1]}"
}

live_on() {
    local image=docker.io/library/busybox:latest run=(nsenter -t "$1" -m -n -p -C)
    case $2 in
    a) "${run[@]}" ctr run -d "$image" live sh -c 'while :; do sleep 1; done' ;;
    b) "${run[@]}" ctr image rm --sync "$image" ;;
    esac
}

# Ends the hosts.
live_stop() {
    unset FERRY_TEST_CONTAINERD
    [ -n "${live_hosts_PID:-}" ] || return 0
    local pid=$live_hosts_PID
    # They end with their input.
    eval "exec ${live_hosts[1]}>&-"
    wait "$pid"
}
