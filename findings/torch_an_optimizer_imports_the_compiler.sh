#!/usr/bin/env bash
# Making an optimizer imports torch's compiler: `torch.optim.Adam(parameters)` brings in `torch._dynamo`, sympy and several hundred modules more,
# though nothing is compiled, as methods of optimizers are kept from being compiled by a decorator that imports the compiler at their first call.
# It hurts whatever is short: command lines, tests, workers that are spawned, and programs that only act, as Stable-Baselines3's `load` makes an
# agent's optimizer; it takes a second or two on a laptop, about as long as `import torch` itself, and lies in the first optimizer and not in the
# imports where one would look for it. One would bet that a class of `torch.optim` needs what `import torch.optim` has brought.
# Remedy: none in public; count it as a part of the start, or make no optimizer where nothing learns.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

begin = time.perf_counter()
import torch
import torch.optim

imported, before = time.perf_counter() - begin, set(sys.modules)
parameter = torch.nn.Parameter(torch.zeros(3))
begin = time.perf_counter()
torch.optim.Adam([parameter])
made, first = time.perf_counter() - begin, set(sys.modules) - before
begin = time.perf_counter()
torch.optim.Adam([parameter])
again = time.perf_counter() - begin
print(f"torch {torch.__version__}: importing it took {imported:.2f} s, the first optimizer {made:.2f} s, the second {again:.4f} s")
print(f"modules that an optimizer needs beyond torch.optim: expected none or a few; seen {len(first)} more,")
print(f"with torch._dynamo: {'torch._dynamo' in first}, with sympy: {'sympy' in first}")
sys.exit(0 if "torch._dynamo" in first and "torch._dynamo" not in before and len(first) > 300 else 1)
PYTHON
echo "as described above"
