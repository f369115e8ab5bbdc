"""Returns in both worlds, and reports that people look at."""
