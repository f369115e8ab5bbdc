"""Trajectories on disk and how they are made."""
