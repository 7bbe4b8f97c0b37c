#!/bin/sh
# benchmarks/airtopk/build.sh WHEELS [FOLDER]: FOLDER/libairtopk.so, for compute capability 9.0 (default FOLDER: here).
#
# WHEELS holds the unpacked wheels of RAFT and of what it includes; nothing of them is installed:
#   pip download --no-deps -d wheels libraft-cu13==25.12.0 librmm-cu13==25.12.0 'rapids-logger==0.2.*'
#   for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d wheels; done
# Needs nvcc 13 and about three minutes.  librmm.so and librapids_logger.so are copied beside the library, and found
# there when it is loaded.
set -eu
wheels=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "${2:-$here}" && cd "${2:-$here}" && pwd)
for part in libraft/include librmm/lib64/librmm.so rapids_logger/lib64/librapids_logger.so; do
    [ -e "$wheels/$part" ] || { echo "$wheels has no $part: unpack the three wheels there" >&2; exit 1; }
done
cp "$wheels/librmm/lib64/librmm.so" "$wheels/rapids_logger/lib64/librapids_logger.so" "$folder"
# RAFT's own CCCL goes before the toolkit's.
nvcc -std=c++17 -O3 -arch=sm_90 --expt-relaxed-constexpr --expt-extended-lambda \
    -DLIBCUDACXX_ENABLE_EXPERIMENTAL_MEMORY_RESOURCE \
    -I"$wheels/libraft/include/rapids" -I"$wheels/libraft/include" -I"$wheels/librmm/include" \
    -I"$wheels/rapids_logger/include" \
    -shared -Xcompiler -fPIC -cudart static --compress-mode=size \
    "$here/airtopk.cu" -o "$folder/libairtopk.so" \
    -L"$folder" -l:librmm.so -l:librapids_logger.so -Xlinker -rpath,'$ORIGIN'
strip --strip-unneeded "$folder/libairtopk.so"
echo "$folder/libairtopk.so"
