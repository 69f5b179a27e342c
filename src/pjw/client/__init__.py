"""The client library: typed calls over mTLS. `pjw.Client` blocks, `pjw.AsyncClient` is awaited.

`requests` says what is asked, `failures` and `retry` what becomes of an error, `config` where to connect to
when nobody says it; only `sync` and `aio` call.
"""
