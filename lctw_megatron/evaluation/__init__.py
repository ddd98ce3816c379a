"""Long-range probes and the report."""
