"""A node of a cluster: pjwd with a gateway, which gives it jobs. Loaded where the configuration names one."""
