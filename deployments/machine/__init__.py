"""Reads this machine's state: processes, CPU time, memory, GPUs."""
