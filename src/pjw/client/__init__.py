"""The client library: typed calls over mTLS. `pjw.Client` blocks, `pjw.AsyncClient` is awaited.

`requests` says what is asked, `failures` and `retry` what becomes of an error; only `sync` and `aio` call.
"""
