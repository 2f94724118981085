"""Runners: they connect the engine, the market and the records, and carry out what the engine decides."""
