#!/usr/bin/env bash
# Benchmarks an NVIDIA GPU that is available for minutes: tests of the Triton kernels, the speed of layers,
# feed-forward blocks, mixtures and a GPT, and a verdict on the default backend. Needs torch with CUDA and triton, no network and no installation.
# usage: tools/gpu_day.sh [--budget SECONDS] [--out DIR]    by default 540 seconds into docs/benchmarks/gpu
#        tools/gpu_day.sh --rehearse [--out DIR]            the same at tiny sizes on a CPU, in Triton's interpreter
# PYTHON names the interpreter (default: python3). The same command again measures what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

for package in torch triton; do
    "$python" -c "import $package" || { echo "$python has no $package: name another interpreter with PYTHON" >&2; exit 2; }
done
for option; do
    # read when triton and torch are imported; compiling for a CPU takes long and rehearses nothing
    [ "$option" != --rehearse ] || export TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1
done
exec "$python" -m einlinear_lab.bench.gpu_day "$@"
