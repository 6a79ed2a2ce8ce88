"""Stateless tensor maths: tensors and numbers in, tensors out.

Nothing here knows a parameter, a parameter group, an optimizer or a process group. Functions whose
name ends in an underscore write in place into the arguments that their docstring names.
"""
