"""A stand-in for `relabel` that other processes import at once."""


def relabel(body, tasks, trajectory):
    return dict.fromkeys(tasks, trajectory["pre_action"][:, :1])
