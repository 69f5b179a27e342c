"""A node of a cluster: a pjwd that gets jobs from a gateway. Loaded if the configuration names a gateway."""
