#!/usr/bin/env bash
# Installs the server as the container has it. It also works without a container: deploy/install.sh CHECKOUT PREFIX
#
# Makes an environment with the server in PREFIX, and compiles its kernels into PREFIX/kernels.
# MODELS and ARCHITECTURES name the shapes and GPUs. An empty MODELS compiles no kernel.
set -euo pipefail

checkout=$1
prefix=$2
models=${MODELS-0.6b}
architectures=${ARCHITECTURES:-sm_90a sm_120a}

python3 -m venv "$prefix"
"$prefix/bin/pip" install --no-cache-dir --disable-pip-version-check "$checkout[server]"
cp "$checkout/deploy/healthcheck.py" "$prefix/healthcheck.py"
mkdir -p "$prefix/kernels"
for model in $models; do
  # shellcheck disable=SC2086  # several words
  QWEN_MEGAKERNEL_CACHE=$prefix/kernels "$prefix/bin/qwen-megakernel" build --model "$model" --arch $architectures
done
