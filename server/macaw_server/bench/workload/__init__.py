"""`macaw bench WORKLOAD`: the workloads as text, request by request against programs, on real servers."""
