#!/usr/bin/env bash
# What the container is made of, also without a container: deploy/install.sh CHECKOUT PREFIX
#
# Makes an environment in PREFIX with the server, and compiles its kernels into PREFIX/kernels.
# MODELS and ARCHITECTURES say for which shapes and GPUs; an empty MODELS compiles none.
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
