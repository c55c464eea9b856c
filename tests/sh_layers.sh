#!/bin/sh
# Dependencies point one way: distill -> teacher, student -> formats -> core; libraries are seen only where they belong.
set -u
bad=0
deny() { # directory, pattern of what it may not include, why
    hits=$(grep -rnE "^#include [\"<]($2)" --include='*.c' --include='*.h' --include='*.cu' "$1" 2>/dev/null)
    [ -z "$hits" ] || { echo "$3:"; echo "$hits"; bad=1; }
}
deny core 'formats/|teacher/|student/|distill/' 'core includes a higher layer'
deny formats 'teacher/|student/|distill/' 'formats includes a higher layer'
deny teacher 'student/|distill/' 'teacher includes student or distill'
deny student 'teacher/|distill/' 'student includes teacher or distill'
for d in formats teacher student distill; do
    deny $d 'cblas|openblas|cuda|cublas|cudnn|nccl' 'a BLAS or CUDA header outside core'
    deny $d 'core/(ref|cpu|cuda)/' 'a backend header outside core'
done
for d in core teacher student distill; do
    deny $d 'zlib|msgpack|jansson|pcre2|utf8proc' 'a format library outside formats'
done
for d in core formats teacher student; do
    deny $d 'curl/' 'libcurl outside distill'
done
hits=$(grep -rnE '\b(exit|abort)\(' --include='*.c' core formats teacher student distill | grep -v '^distill/main.c:')
[ -z "$hits" ] || { echo "only main may exit:"; echo "$hits"; bad=1; }
exit $bad
