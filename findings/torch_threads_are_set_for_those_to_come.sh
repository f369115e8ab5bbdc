#!/usr/bin/env bash
# `torch.set_num_threads(n)` sets the number for the Python thread that calls it and for all that begin later, not for those that run
# already. A worker that limits itself to one thread leaves its caller at all cores, and every thread that is made afterwards, by
# whomever, at one. It hurts whoever limits torch around some work in a pool of threads, as an env that is stepped beside a learner:
# what is slow from then on has nothing to do with it. One would bet on one number for the process, or one for each thread.
# Remedy: set it before any thread is made; else set it back where it was set, and in each thread that works with torch.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$scratch/threads.py" <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

torch.set_num_threads(4)
running = ThreadPoolExecutor(1)


def told(pool):
    return pool.submit(torch.get_num_threads).result()


def worker():
    torch.set_num_threads(1)
    return torch.get_num_threads()


before = {"caller": torch.get_num_threads(), "a thread that runs": told(running)}
with ThreadPoolExecutor(1) as pool:
    own = pool.submit(worker).result()
after = {"caller": torch.get_num_threads(), "a thread that runs": told(running)}
with ThreadPoolExecutor(1) as pool:
    later = told(pool)
running.shutdown()
print(f"torch {torch.__version__}; set to 4, then to 1 by a worker that ends: {own} in it")
print(f"before {before}, after {after}")
print(f"in a thread that begins afterwards: expected 4, as in its caller, or 1 everywhere; seen {later}")
sys.exit(0 if before == after == dict.fromkeys(before, 4) and (own, later) == (1, 1) else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/threads.py"
echo "as described above"
