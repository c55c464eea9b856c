#!/bin/sh
# Installs the Debian packages that the build needs, or prints the one command that does. Quiet where all is there.
set -eu
missing=
need() { # header, package
    for dir in /usr/include /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu /usr/local/include; do
        [ -e "$dir/$1" ] && return 0
    done
    missing="$missing $2"
}
command -v "${CC:-gcc}" >/dev/null 2>&1 || missing="$missing gcc"
if [ "${CUDA:-auto}" != 0 ] && { command -v nvcc || [ -x /usr/local/cuda/bin/nvcc ]; } >/dev/null 2>&1; then # nvcc compiles the host's side of kernels with it
    command -v g++ >/dev/null 2>&1 || missing="$missing g++"
fi
need openblas-pthread/cblas.h libopenblas-dev
need msgpack.h libmsgpack-dev
need pcre2.h libpcre2-dev
need utf8proc.h libutf8proc-dev
need jansson.h libjansson-dev
need cmocka.h libcmocka-dev
need zlib.h zlib1g-dev
need stdlib.h libc6-dev
[ -z "$missing" ] && exit 0
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
cmd="$sudo apt-get install -y --no-install-recommends$missing"
if command -v apt-get >/dev/null 2>&1 && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
    echo "installing:$missing"
    { $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $cmd -qq >/dev/null; } && exit 0
fi
echo "missing packages; install them with:" >&2
echo "    $cmd" >&2
exit 5
