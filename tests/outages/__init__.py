"""Machines of a cluster: each with a network, processes and mounts of its own, a cable and a power switch.

Everything here runs below `scripts/apart`, in namespaces which vanish with their last process.
"""
