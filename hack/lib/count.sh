# shellcheck shell=bash
# Running checks and tests and counting how they end.

passed=0
failed=0
skipped=0
failures=()
skips=()
# What the tests that failed have said.
said=()
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME COMMAND...: one check. Its output is shown only if it fails, as it then does itself.
step() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        failures+=("$name")
        cat "$log"
        echo "FAILED  $name ($((SECONDS - start)) s)"
        return 1
    fi
}

# skip NAME REASON: a check that cannot be made here.
skip() {
    skipped=$((skipped + 1))
    skips+=("$1: $2")
    echo "skipped $1: $2"
}

# cargo_tests NAME COMMAND...: every test counts. A test says itself that it is skipped, with a line
# `skipped: NAME: REASON` (see ferry_tests::skip).
cargo_tests() {
    local name=$1 start=$SECONDS status=0 good=0 bad=0 left=0 line ok no ignored
    shift
    echo "        $name: $*"
    "$@" 2>&1 | tee "$log" || status=1
    while read -r ok no ignored; do
        good=$((good + ok)) bad=$((bad + no)) left=$((left + ignored))
    done < <(sed -nE 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed; ([0-9]+) ignored;.*/\1 \2 \3/p' "$log")
    while read -r line; do
        good=$((good - 1)) left=$((left + 1))
        skips+=("$line")
    done < <(sed -nE 's/^.*skipped: (.*)$/\1/p' "$log")
    while read -r line; do
        failures+=("$line")
        said+=("$(said_by "$line")")
    done < <(sed -nE 's/^test (.*) \.\.\. FAILED$/\1/p' "$log")
    # It did not compile, was killed, or ran nothing at all.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then
        bad=1
        failures+=("$name (see above)")
    fi
    passed=$((passed + good)) failed=$((failed + bad)) skipped=$((skipped + left))
    echo "        $name: $good passed, $bad failed, $left skipped ($((SECONDS - start)) s)"
}

# said_by TEST: the end of what it has printed.
said_by() {
    awk -v test="---- $1 stdout ----" '$0 == test { on = 1 } on && $0 != test && /^(---- .* ----|failures:)$/ { exit } on' \
        "$log" | tail -n 60
}

# Prints what was not passed by name, then the counts. Fails if anything failed.
summary() {
    echo
    [ ${#skips[@]} = 0 ] || printf 'skipped: %s\n' "${skips[@]}"
    [ ${#said[@]} = 0 ] || printf '%s\n' "${said[@]}"
    [ ${#failures[@]} = 0 ] || printf 'failed: %s\n' "${failures[@]}"
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ]
}
