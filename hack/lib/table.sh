# shellcheck shell=bash
# The tables of what ferry and the reference answer, and of what survives a checkpoint: tests add rows
# to them (see ferry_tests::table).
# shellcheck disable=SC2154  # log is count.sh's

# Where the tests find them.
table_start() {
    FERRY_TABLE=$(mktemp)
    FERRY_SURVIVORS=$(mktemp)
    export FERRY_TABLE FERRY_SURVIVORS
    trap 'rm -f "$log" "$FERRY_TABLE" "$FERRY_SURVIVORS"' EXIT
}

# Prints what survives, if that was tried.
table_survivors() {
    [ -s "${FERRY_SURVIVORS:-}" ] || return 0
    echo
    {
        echo "survives a checkpoint|on the same host|from host to host|reference, on the same host"
        LC_ALL=C sort "$FERRY_SURVIVORS"
    } | awk -F'|' '
        {
            for (n = 1; n <= 4; n++) {
                cell[NR, n] = $n
                if (length($n) > width[n]) width[n] = length($n)
            }
        }
        END {
            for (row = 1; row <= NR; row++) {
                line = ""
                for (n = 1; n <= 4; n++) line = line sprintf("%-*s  ", width[n], cell[row, n])
                sub(/ +$/, "", line)
                print line
            }
        }'
}

# Prints the first, for each containerd in the order of areas and of what was done in them.
table_show() {
    [ -s "${FERRY_TABLE:-}" ] || return 0
    echo
    # Rows of one area come in a row, but areas in the order in which tests end.
    LC_ALL=C sort --stable --field-separator='|' --key=1,1 --key=2,2 "$FERRY_TABLE" | awk -F'|' '
        BEGIN { split("containerd|area|case|ferry|reference", head, "|") }
        { for (n = 1; n <= 5; n++) cell[NR, n] = $n == "" ? "default" : $n }
        END {
            for (n = 1; n <= 5; n++) {
                cell[0, n] = head[n]
                for (row = 0; row <= NR; row++)
                    if (length(cell[row, n]) > width[n]) width[n] = length(cell[row, n])
            }
            for (row = 0; row <= NR; row++) {
                line = ""
                for (n = 1; n <= 5; n++) line = line sprintf("%-*s  ", width[n], cell[row, n])
                sub(/ +$/, "", line)
                print line (row && cell[row, 4] != cell[row, 5] ? "  *" : "")
            }
            print "* the answers differ; tests/tests/matrix/differences.rs says why that is wanted"
        }'
}
