"""Live and paper runs: orders, the position on the disk, and what a restart finds."""

from __future__ import annotations
