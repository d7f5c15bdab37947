"""Measurements; each program prints one JSON line per case."""
