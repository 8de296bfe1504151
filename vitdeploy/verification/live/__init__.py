"""A live server held against a bundle: the golden tensors and images replayed over the network.

``round.py`` is one round of it, ``watch.py`` repeats it; ``client.py`` is what can be asked of a server, and
``triton_client.py`` what asks it.
"""
