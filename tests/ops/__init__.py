"""Tests of ``fullrank.ops``."""
