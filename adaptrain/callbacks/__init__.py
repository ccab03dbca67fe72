"""Thin Lightning callbacks: in a hook, read, ask a policy, apply, record."""
