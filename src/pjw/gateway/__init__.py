"""The gateway of a cluster: the API of pjw.v1 over many nodes. `pjwd gateway` runs it, and needs no root.

The gateway owns the facts of each job and its end. An engine decides which node gets a job. The node runs it.
"""
