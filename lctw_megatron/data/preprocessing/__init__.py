"""From a corpus of text to a token dataset. Nothing else of the project imports it."""
