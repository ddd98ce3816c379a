"""Windows, and running a short-context model over them."""
