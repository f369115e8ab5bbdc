"""A stand-in for `relabel` that other processes import at once."""


def relabel(trajectory, body, tasks):
    return dict.fromkeys(tasks, trajectory["pre_action"][:, :1])
