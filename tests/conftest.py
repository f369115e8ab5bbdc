"""Set before torch and MuJoCo are imported: small tensors want one thread, and machines have no display."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
