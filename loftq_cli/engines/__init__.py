"""Runs the tasks of a plan in this process, and checks what came of them."""
