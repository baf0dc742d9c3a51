"""Query sets: what users asked for, next to their histories and the item that was wanted."""
