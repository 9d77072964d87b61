"""Runs the tasks of a plan: in this process today, on a cluster later."""
