"""Tests of task evaluation."""
