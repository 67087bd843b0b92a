"""The agent: one per node; enrols it and serves its workloads."""
