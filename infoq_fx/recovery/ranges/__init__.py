"""Range equalization: where factors per channel can move between layers, which to choose, and how to apply them."""
