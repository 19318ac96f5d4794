"""Layers as products of smaller ones: the algebra, the forms a layer can take, and the choice of ranks."""
