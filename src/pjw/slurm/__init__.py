"""pjwd-slurm: the process of a gateway that calls Slurm's programs. Loaded by it alone."""
