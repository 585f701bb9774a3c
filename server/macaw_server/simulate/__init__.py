"""`macaw simulate`: the server's own scheduling code on a virtual clock, for any number of engines and tenants."""
