"""Estimators of a policy's return from logged transitions: what a world model has to beat.

Every one has an `estimate(data, policies, starts, horizon, seed)` that gives returns [P, E]. They are our own: d3rlpy
2.8.1 needs gymnasium 1.0.0, which is older than ours, and its FQE gives discounted values of one stationary policy at a
time; scope-rl 0.2.1 builds on d3rlpy.
"""
