"""Keys in PKCS#11 tokens: one spawned worker process per session, asked over a socket pair.

`uri`, `labels`, `keys`, `wire` and `errors` are plain values; `token`, `objects` and `worker` run in
the worker process and are the only ones that load python-pkcs11; `pool` and `inventory` run in the
host process, which never loads a vendor library.
"""
