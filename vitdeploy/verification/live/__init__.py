"""A live server held against a bundle: the golden tensors and images replayed over the network.

``run.py`` is one round of it, ``watch.py`` repeats it; ``triton_client.py`` is what talks to the server.
"""
