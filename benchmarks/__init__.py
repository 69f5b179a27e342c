"""What pjw costs, measured beside its peers and the kernel; docs/performance.md says how, and what was found.

Suites, each with `run(quick)`: start, stream, line, history, cli, memory, scale. They use pjwd (the service),
clients and followers (who talk to it, by connect), processes (what those cost), and what pjw is held against:
floor with floor.c, peers with told.c, grpc_source. __main__ runs them; report, machine, check, document and
plots are what becomes of the figures.
"""
