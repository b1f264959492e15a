"""What a DiT is made of: tokens, blocks, attention, linear layers, autoencoders."""
