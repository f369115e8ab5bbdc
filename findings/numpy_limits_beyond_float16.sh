#!/usr/bin/env bash
# NumPy 2 compares a float16 array with a Python number in float16. A limit that float16 cannot hold becomes infinity on
# the way, and `abs(values) <= 1e18` is true for infinite values: with NumPy 1 it was false, and with float32 it still is.
# It hurts whoever checks sizes of logged or downloaded numbers before use: half-precision recordings of robots, whose
# overflown readings are infinite, pass a check that is right for every other dtype. One would bet on a comparison of
# numbers, whatever their types, or on an error. `np.isfinite`, or a limit of at most `np.finfo(dtype).max`, tells.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
cat > look.py <<'PYTHON'
import sys
import warnings

import numpy as np

warnings.simplefilter("ignore", RuntimeWarning)
readings = [1.0, 60000.0, np.inf]
seen = {dtype: (np.abs(np.array(readings, dtype)) <= 1e18).tolist() for dtype in ("float16", "float32", "float64")}
print(f"numpy {np.__version__}: expected [True, True, False] of every dtype, seen {seen}")
right = [True, True, False]
surprising = seen["float16"] == [True, True, True] and seen["float32"] == seen["float64"] == right
sys.exit(0 if surprising == (sys.argv[1] == "surprises") else 1)
PYTHON
for version in 2.4.6:surprises 1.26.4:does-not; do
    python3 -m venv "venv-${version%:*}"
    "venv-${version%:*}/bin/pip" install --quiet "numpy==${version%:*}"
    "venv-${version%:*}/bin/python" look.py "${version#*:}"
done
echo "as described above"
