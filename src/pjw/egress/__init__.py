"""pjwd-egress: connects for jobs to names on the network, as an unprivileged process of its own."""
