#!/bin/sh
# Train a tiny ternary model from nothing, SFT then DPO, and ask the packed model questions: on a CPU (a GPU is used
# if there is one), without a download other than the Python packages.
set -eu
cd "$(dirname "$0")/.."

environment=$(scripts/environment.sh any)
PATH=$environment/bin:$PATH
PYTHONPATH=$PWD/src
export PATH PYTHONPATH
export AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tensors this small: a pool of threads mostly waits for itself, for minutes when the cores are busy.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec python scripts/demo.py
