"""Measure the harm that a client, or its job, can do to another client and to the host: `make attack`.

Attackers are ordinary clients with ordinary jobs. They use the public interface alone, on loopback. While an
attack goes on, a victim does its own work, and we measure the victim.
"""
