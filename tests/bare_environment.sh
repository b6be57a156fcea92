#!/bin/sh
# From pip to compiled kernels where there is no CUDA toolkit and no C++ compiler: in an environment of its own, with an
# empty folder as PATH.
#   tests/bare_environment.sh [ARCH] [SHAPE]     (sm_120a and 0.6b; PYTHON names the interpreter)
# It leaves nothing but pip's cache.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/empty"
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
cd "$root"

PATH=$folder/empty "$python" -m pip install --quiet -r requirements.txt "cuda-toolkit[nvrtc,cudart]==13.0.*"
bare="env -i HOME=$folder PATH=$folder/empty $python -m qwen_megakernel"
$bare doctor | grep -E "compiler|kernels" || true
$bare build --arch "${1:-sm_120a}" --model "${2:-0.6b}" --out "$folder/kernels"
ls -l "$folder"/kernels/*/
