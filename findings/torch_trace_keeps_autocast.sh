#!/usr/bin/env bash
# A function that torch.jit.trace records while torch.autocast is on keeps autocast's rounding for ever: called outside,
# in float32, it still computes in bfloat16 inside, returns bfloat16, and says nothing. Whoever traces lazily, at the
# first call, gets one or the other precision for the rest of the process by where that first call happened to be.
# One would bet that autocast is a property of where a function runs, as it is of eager code, and not of where it was traced.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
layer, x = torch.nn.Linear(64, 1).requires_grad_(False), torch.randn(8, 64)
with torch.no_grad():
    outside = torch.jit.trace(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.jit.trace(layer, x)
    expected = layer(x)
    errors = {name: (traced(x).float() - expected).abs().max().item() for name, traced in
              {"traced outside autocast": outside, "traced inside autocast": inside}.items()}
    dtypes = [outside(x).dtype, inside(x).dtype]
print(f"torch {torch.__version__}, both called outside autocast")
for (name, error), dtype in zip(errors.items(), dtypes):
    print(f"{name}: expected torch.float32 and an error of 0, seen {dtype} and {error:.1e}")
sys.exit(0 if list(errors.values())[0] == 0 and list(errors.values())[1] > 1e-4 else 1)
PYTHON
echo "as described above"
