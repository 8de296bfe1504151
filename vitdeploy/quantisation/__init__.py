"""Integers and 8-bit floats in place of a deployed model's GEMMs, so that its answers stay what they were."""
