"""Looking at data and weights: datasets, token statistics, documents, targets in their text."""
