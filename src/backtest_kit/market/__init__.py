"""What a strategy may see: candles from their source, checked, cached, aligned, and never from the future."""
