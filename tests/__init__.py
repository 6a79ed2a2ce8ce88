"""The tests of fullrank."""
