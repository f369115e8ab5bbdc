#!/usr/bin/env bash
# safetensors writes the entries of `metadata` in an order that it draws anew at every save: the same tensors with the
# same metadata become files with different bytes, within one process too. It hurts whoever tells files apart by their
# digest: caches, content-addressed stores, checks of "is this still the policy of yesterday", byte-for-byte tests. One
# would bet on the order of the dict, or on a sorted one, as tensors are sorted. One entry, such as one JSON text that
# holds all others, has one order.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import json
import sys

import numpy as np
import safetensors
from safetensors.numpy import save

tensors = {"weight": np.zeros((2, 3), np.float32), "bias": np.ones(3, np.float32)}
metadata = {"family": "ppo", "run": "3", "seed": "17", "task": "walk"}
several = {save(tensors, metadata=metadata) for _ in range(40)}
one = {save(tensors, metadata={"all": json.dumps(metadata, sort_keys=True)}) for _ in range(40)}
none = {save(tensors) for _ in range(40)}
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
print(f"four entries, saved 40 times: expected 1 file, seen {len(several)} different ones")
print(f"one entry: {len(one)}; no metadata: {len(none)}")
sys.exit(0 if len(several) > 1 and len(one) == len(none) == 1 else 1)
PYTHON
echo "as described above"
