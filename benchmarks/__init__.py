"""Measurements; each checks its results before it times or reports them."""
