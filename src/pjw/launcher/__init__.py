"""The launcher, for work that needs privilege: a small process of root, standard library only, one thread.

It creates cgroups, spawns pjw-init, signals, accounts and removes. It checks each request again as if the
server were hostile, never opens a path that a client named, and never reads a byte of a job's output.
"""
