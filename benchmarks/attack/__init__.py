"""What one client, or one client's job, can do to another client and to the host: `make attack`.

Attackers are ordinary: a certificate as everybody's, jobs as everybody's, all of it over the public
interface, and on loopback. Beside each of them a victim goes on with its own work, and is measured.
"""
