"""The former names of what `tiny` has."""

import tiny

METHODS, images, features = tiny.ADAPTERS, tiny.images, tiny.features


def make(method, attention="sdpa", **settings):
    return tiny.model(method, attention=attention, **settings)
