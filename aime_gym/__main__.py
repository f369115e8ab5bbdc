"""`python -m aime_gym` is `aime-gym`."""

import sys

from aime_gym.cli import main

# Worker processes import the main module again and must not run it.
if __name__ == "__main__":
    sys.exit(main())
