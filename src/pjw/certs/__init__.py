"""Identities: certificates, the files that hold them, and the names they give.

Read in this order: `profile` (the certificates that pjw accepts, and the rule for names), `address` (the
address of a server), `files` (reading and writing), `tls` (the settings that must hold before grpc is
imported, and the self-test), `checks` (the faults of a certificate), `credentials` (the files of each end),
`identity` (a verified certificate to a name), `authority` (a development CA). Nothing is imported here:
`profile`, `files` and `tls` need the standard library alone, so that the command line does not pay 65 ms for
importing `cryptography`.
"""
