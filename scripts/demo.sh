#!/bin/sh
# Train a tiny ternary model from nothing, SFT then DPO, and ask the packed model questions: on a CPU, without a
# download other than the Python packages.
set -eu
cd "$(dirname "$0")/.."

environment=$(scripts/environment.sh any)
PATH=$environment/bin:$PATH
PYTHONPATH=$PWD/src
export PATH PYTHONPATH
export AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

set -x
axolotl train examples/falcon-e/tiny/sft.yaml --launcher python
axolotl train examples/falcon-e/tiny/dpo.yaml --launcher python
python examples/falcon-e/tiny/ask.py outputs/tiny-dpo/packed --min 0.9
