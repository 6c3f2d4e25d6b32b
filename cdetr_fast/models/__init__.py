"""The model, in the order in which data flows: backbone, position, encoder, decoder, heads."""
