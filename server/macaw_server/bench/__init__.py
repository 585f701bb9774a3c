"""`macaw bench`: workloads over HTTP against Macaw and another server in alternation, and the machine's own limit."""
