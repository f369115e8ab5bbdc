"""Agents: learn, predict, save, load."""
