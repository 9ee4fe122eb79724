"""The network: a configuration in, an nn.Module out."""
