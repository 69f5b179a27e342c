"""Measure the costs of pjw, its peers and the kernel; docs/performance.md has the methods and the results.

Suites, each with `run(quick)`: start, stream, line, history, cli, memory, scale. They use pjwd (the service),
clients and followers (which call it through connect), processes (their costs), and the programs that pjw is
compared with: floor with floor.c, peers with told.c, grpc_source. __main__ runs them; report, machine, check,
document and plots use the figures.
"""
