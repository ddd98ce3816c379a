"""From a corpus of text to a token dataset. Training and evaluation never import it."""
