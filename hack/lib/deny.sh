# shellcheck shell=bash
# cargo-deny, built once into the cache (nobody packages it), in the background.

deny_tools=${FERRY_CACHE:-$HOME/.cache/ferry}/tools
deny_job=

# Starts the build if cargo-deny is missing.
deny_start() {
    [ ! -x "$deny_tools/bin/cargo-deny" ] || return 0
    mkdir -p "$deny_tools"
    # A quick build matters here, a quick program does not.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=0 \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        nice cargo install cargo-deny --locked --quiet --root "$deny_tools" \
        --target-dir "$deny_tools/build" >"$deny_tools/log" 2>&1 &
    deny_job=$!
}

# Waits for the build.
deny_wait() {
    if [ -n "$deny_job" ] && ! wait "$deny_job"; then
        cat "$deny_tools/log"
        return 1
    fi
    rm -rf "$deny_tools/build"
    "$deny_tools/bin/cargo-deny" --version
}

# deny_check WHAT...
deny_check() {
    "$deny_tools/bin/cargo-deny" --all-features --log-level error check "$@"
}

# Whether the database of advisories can be reached.
deny_database() {
    timeout 120 "$deny_tools/bin/cargo-deny" fetch db >/dev/null 2>&1
}
