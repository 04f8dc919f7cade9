#!/bin/sh
# Installs OpenVINO GenAI from PyPI into the folder given. It reads GGUF files as they are.
#
#   bench/peers/install_openvino.sh /opt/peers/openvino ~/.kvasir/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
#
# Needs Python 3.10 to 3.14 with venv and 300 MB. Can be run again: what is there is kept.
set -eu
version=2026.4.1.0

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [MODEL.gguf]" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)

[ -x "$folder/venv/bin/python" ] || python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -c 'import openvino_genai' 2>/dev/null ||
    "$folder/venv/bin/python" -m pip install --quiet --no-cache-dir "openvino-genai==$version"

[ $# -eq 2 ] || exit 0
mkdir -p "$folder/weights"
ln -sf "$(realpath "$2")" "$folder/weights/Q4_1.gguf"
