"""Versions of the saemonitor wire format; see `v1`."""
