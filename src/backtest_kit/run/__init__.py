"""Runners: they bring the engine, the market and the records together, and do what the engine decides."""
