"""Bodies: what acts, what it senses, which tasks it has; this package's own, and those of any Gymnasium env."""
