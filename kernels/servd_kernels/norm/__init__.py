"""Owns the place of what the norms share (triton.py; common/norm.hpp). It is no op: it has no reference.
Does not know any one norm."""
