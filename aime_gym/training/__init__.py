"""One training loop and its callbacks."""
