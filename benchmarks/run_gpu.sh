#!/usr/bin/env bash
# One command for a machine with a GPU: builds, tests and measures in under nine minutes, and prints a short table last.
#   benchmarks/run_gpu.sh OUT_DIR            (PYTHON=python3.12 to choose another interpreter; --dry-run prints the steps)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_steps.py "$@"
