"""Measure collectives between processes: NCCL or gloo, on one node and across nodes."""
