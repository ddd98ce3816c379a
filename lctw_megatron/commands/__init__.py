"""The command lines: one verb each, no logic. `tools/` and the console scripts run them."""
