"""Gymnasium environments: the real world and the dream."""
