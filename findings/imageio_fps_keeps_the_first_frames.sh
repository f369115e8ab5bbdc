#!/usr/bin/env bash
# imageio.get_reader(film, "ffmpeg", fps=10) is to hand out ten frames for each second of the film. Of one with 30 it hands out the
# first three frames as they are, a thirtieth of a second apart, and every third one from then on: 22 frames of two seconds in
# place of 20, whose first steps last a third of all others. Whoever learns from films at a fixed time step trains on a jump at
# the beginning of each. One would bet that a rate means equal times. Remedy: read all frames and choose by their times.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet numpy==2.4.6 imageio==2.38.1 imageio-ffmpeg==0.8.1
cat > "$scratch/film.py" <<'PYTHON'
import sys

import imageio
import imageio_ffmpeg
import numpy as np

film = sys.argv[1] + "/film.mp4"
writer = imageio.get_writer(film, fps=30, macro_block_size=1)
for number in range(60):  # a frame shows its number as the width of a white bar
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, : number + 1] = 255
    writer.append_data(frame)
writer.close()
seen = [int((frame[..., 0].mean(0) > 128).sum()) - 1 for frame in imageio.get_reader(film, "ffmpeg", fps=10)]
steps = [later - earlier for earlier, later in zip(seen, seen[1:])]
print(f"imageio {imageio.__version__}, imageio-ffmpeg {imageio_ffmpeg.__version__}, 60 frames at 30 a second, read at 10")
print(f"expected 20 frames, 3 apart; seen {len(seen)}, numbers {seen[:5]}, ..., so {steps[:4]}, ... apart")
sys.exit(0 if len(seen) == 22 and steps[:2] == [1, 1] and set(steps[2:]) == {3} else 1)
PYTHON
"$scratch/venv/bin/python" -W ignore "$scratch/film.py" "$scratch"
echo "as described above"
