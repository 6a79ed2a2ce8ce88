"""Finished runs side by side: read from their folders, compared, written as tables, figures and a page."""
