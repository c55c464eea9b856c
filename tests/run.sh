#!/bin/sh
# Every test that needs no GPU: the suites of the C binary, then the shell tests; one count at the end.
set -u
b=$1
passed=0 failed=0
"$b/retort-tests" 2>&1 | tee "$b/tests.log"
line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$b/tests.log" | tail -n 1)
if [ -z "$line" ]; then
    echo "retort-tests did not finish"
    failed=1
else
    passed=${line%% passed*}
    failed=${line#*, }
    failed=${failed%% failed*}
fi
for t in tests/sh_*.sh; do
    [ -e "$t" ] || continue
    if sh "$t" "$b" >"$b/$(basename "$t").log" 2>&1; then
        passed=$((passed + 1))
        echo "ok $t $(grep -h '^SKIP' "$b/$(basename "$t").log" | tr '\n' ' ')"
    else
        failed=$((failed + 1))
        echo "FAILED $t"
        tail -n 40 "$b/$(basename "$t").log"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
