"""Runs per-tensor work; the only room that knows threads, processes and devices."""
