"""Who is speaking: certificates, the files that hold them, and the names they give.

Read in this order: `profile` (what pjw accepts, and the rule for names), `address` (where a client
connects to), `files` (reading and writing), `tls` (what must hold before grpc is imported, and the
self-test), `checks` (what is wrong with a certificate), `credentials` (what each end needs), `identity`
(a verified certificate to a name), `authority` (a development CA). Nothing is imported here:
`profile`, `files` and `tls` need the standard library alone, so that the command line does
not pay 65 ms for importing `cryptography`.
"""
