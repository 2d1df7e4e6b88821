"""The seeded campaign of faults against a running set with busy clients; see `python -m tests.faults --help`.

`schedule` says what is done to the set and in which order, `report` what came of it; both are pure. `place`,
`network` and `injection` do it, `busy` and `busy_region` are the clients, `run` brings them together.
"""
