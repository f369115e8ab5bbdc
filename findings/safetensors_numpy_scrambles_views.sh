#!/usr/bin/env bash
# safetensors.numpy.save_file writes the memory under a NumPy view, not the view: a transposed, Fortran-ordered or
# strided array comes back with its shape and other numbers, without an error. Whoever saves `weights.T`, a column
# slice, or what `np.linalg` and pandas hand out in Fortran order, keeps a file of scrambled weights.
# safetensors.torch refuses tensors that are not contiguous, so one would bet on an error, or on a copy.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

table = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"transposed": table.T, "Fortran order": np.asfortranarray(table), "every second column": table[:, ::2]}
scrambled = 0
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
for name, view in views.items():
    save_file({"x": view}, "x.safetensors")
    loaded = load_file("x.safetensors")["x"]
    scrambled += loaded.shape == view.shape and not np.array_equal(loaded, view)
    print(f"{name}: expected {view.tolist()}, seen {loaded.tolist()}")
save_file({"x": np.ascontiguousarray(table.T)}, "x.safetensors")
remedy = np.array_equal(load_file("x.safetensors")["x"], table.T)
print(f"with np.ascontiguousarray: {'as expected' if remedy else 'scrambled, too'}")
sys.exit(0 if scrambled == len(views) and remedy else 1)
PYTHON
echo "as described above"
