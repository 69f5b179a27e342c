"""The client library: typed calls over mTLS. `pjw.Client` blocks, `pjw.AsyncClient` is awaited.

`requests` builds each call, `failures` and `retry` handle its errors, `config` finds the address and the
credentials when the caller gives none; only `sync` and `aio` make calls.
"""
