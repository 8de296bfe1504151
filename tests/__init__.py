"""The tests, in the order of the package; doubles in fakes, what several tests use in helpers."""
