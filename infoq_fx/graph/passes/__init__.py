"""Graph passes, one per file. A pass edits the graph in place and returns whether it changed anything."""
