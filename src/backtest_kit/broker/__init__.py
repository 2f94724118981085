"""Brokers: what carries an order to an exchange. `base` has the protocol, the other modules implement it."""

from __future__ import annotations
