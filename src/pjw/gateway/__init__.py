"""The gateway of a cluster: the API of pjw.v1 over many nodes. `pjwd gateway` runs it, and needs no root.

It owns what a job is and what has become of it. Where a job goes decides an engine; what runs it is a node.
"""
