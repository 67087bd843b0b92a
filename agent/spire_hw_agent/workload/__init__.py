"""What workloads see: the Workload API and who is calling it."""
