"""Kernels for sm_90 in Gluon, imported by launch.py alone, at the first call that wants them."""
