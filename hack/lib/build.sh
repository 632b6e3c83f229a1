# shellcheck shell=bash
# Building the workspace's programs. FERRY_PROFILE is a cargo profile: dev (default) or release.
# FERRY_FEATURES are cargo features to build them with.

workspace=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
FERRY_PROFILE=${FERRY_PROFILE:-dev}

# program NAME: where the built program is.
program() {
    local folder=$FERRY_PROFILE
    [ "$folder" != dev ] || folder=debug
    echo "${CARGO_TARGET_DIR:-$workspace/target}/$folder/$1"
}

build_programs() {
    (cd "$workspace" &&
        cargo build --quiet --package ferry-hide --profile "$FERRY_PROFILE" &&
        cargo build --quiet --workspace --bins --profile "$FERRY_PROFILE" --features "${FERRY_FEATURES:-}" &&
        { [ "$FERRY_PROFILE" != release ] || static_tar; })
}

# The fast tar starts eight times in a pause: half a millisecond less each without shared libraries.
static_tar() {
    cargo rustc --quiet --package ferry-tar --bin ferry-tar --profile "$FERRY_PROFILE" -- \
        -C target-feature=+crt-static
}
