"""Each algorithm again, from its paper: dense, slow and plain, for the tests to compare with.

Nothing here imports ``fullrank``. Every class works on a list of tensors that it changes in place,
keeps the explicit full-size residual, loops where the library uses a formula, and takes the bases of
a step from its caller, or from an exact SVD when it is given none.
"""
