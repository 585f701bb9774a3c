#!/usr/bin/env bash
# On a machine with a GPU: correctness first, then tile shapes, the cost model and the engine's step. Reports go to $OUT
# (default: gpu-report).
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:=gpu-report}" "${PYTHON:=python3}"
mkdir -p "$OUT"
export PYTHONPATH="server:kernels:integrations:tests${PYTHONPATH:+:$PYTHONPATH}" MACAW_CACHE_DIR="$OUT/cache"
"$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_triton.py tests/kernels/test_triton_layout.py \
    tests/server/engine/test_graphs.py tests/server/engine/test_overlap.py | tee "$OUT/tests.txt"
"$PYTHON" -m macaw_server kernels check --device cuda | tee "$OUT/check.txt"
"$PYTHON" -m macaw_server kernels fit --device cuda --dtype bfloat16 --heads 32:8x128 --heads 32:32x128 | tee "$OUT/fit.txt"
"$PYTHON" -m macaw_server kernels bench --device cuda --dtype bfloat16 | tee "$OUT/bench.txt"
"$PYTHON" tests/bench/engine_step.py --device cuda | tee "$OUT/step.txt"
